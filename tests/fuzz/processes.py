"""Commands of the package as forks of one server that has everything imported, so that a case takes a second."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import redirect_output

CALM = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",  # a name of nothing local is refused at once
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Calls of the standard library after which a folder or file looks otherwise.
CHANGES = {"mkdir", "open", "rename", "replace", "rmdir", "unlink"}
OUR_CODE = f"{os.sep}llava{os.sep}"


def start_server() -> None:
    """Say what the server process imports; before the first command."""
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preload", "llava.cli", "datasets"])


@dataclass(frozen=True)
class Trap:
    """A signal that a command gets at its call number `call`, counted among our functions and changes of files.

    With `call` 0 it only counts, and writes the number into `counted`.
    """

    call: int = 0
    number: int = signal.SIGTERM
    counted: str | None = None


class Command:
    """`llava ARGUMENTS`, started in `folder`.

    Args:
        arguments: after the command's name.
        folder: the working directory.
        log: file that gets what it prints.
        trap: see `Trap`.
    """

    def __init__(self, arguments: list[str], folder: Path, log: Path, trap: Trap | None = None) -> None:
        self.arguments, self.log, self.began = arguments, log, time.monotonic()
        log.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_run, args=(arguments, str(folder), str(log), trap))
        self.process.start()

    def wait(self, timeout: float) -> int | None:
        """Exit code, minus the signal that ended it; None where it is killed because it takes longer."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        self.seconds = time.monotonic() - self.began
        return code

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def call_in_fork(function: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 120) -> Any:
    """What a function returns in a fork; a RuntimeError with the error's text where it fails."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments, str(folder)))
    process.start()
    theirs.close()
    try:
        result, error = ours.recv() if ours.poll(timeout) else (None, f"no answer after {timeout} s")
    except EOFError:
        result, error = None, "the process died"
    process.kill() if error else None
    process.join()
    if error:
        raise RuntimeError(error)
    return result


def _call(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    _begin(folder, os.devnull)
    try:
        pipe.send((function(*arguments), None))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the result
        pipe.send((None, f"{type(error).__name__}: {error}"))


def _begin(folder: str, log: str) -> None:
    import huggingface_hub.constants

    os.setsid()
    os.chdir(folder)
    redirect_output(log)
    os.environ.update(CALM)  # the server may be one that other tests have started
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LLAVA_DEBUG"):
        os.environ.pop(name, None)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    multiprocessing.set_start_method("fork", force=True)


def _run(arguments: list[str], folder: str, log: str, trap: Trap | None) -> None:
    _begin(folder, log)
    sys.argv = ["llava", *arguments]
    from llava.cli import main

    try:
        with _set(trap) if trap is not None else contextlib.nullcontext():
            main()
    finally:
        atexit._run_exitfuncs()  # as at the end of a command; multiprocessing leaves them out


@contextlib.contextmanager
def _set(trap: Trap) -> Iterator[None]:
    count = 0

    def on_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call":
            relevant = OUR_CODE in frame.f_code.co_filename
        else:
            relevant = event == "c_call" and argument.__name__ in CHANGES
        if not relevant:
            return
        count += 1
        if count == trap.call:
            sys.setprofile(None)
            os.kill(os.getpid(), trap.number)

    counted = None if trap.counted is None else Path(trap.counted).resolve()
    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(None)
        if counted is not None:
            counted.write_text(str(count))
