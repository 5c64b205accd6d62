"""Start a launcher, and give its training processes the time to write a checkpoint when the run is to stop.

    python llava/train/launching/supervise.py deepspeed --num_gpus 8 llava/train/train_mem.py --flag value ...

Launchers end their processes after 30 seconds when they get SIGTERM or Ctrl-C, and die of SIGUSR1: too early for
a checkpoint of a large model. So the launcher runs in a session of its own, where a terminal's Ctrl-C does not reach
it, and signals go straight to the ranks, which finish their step, write, and end (see `llava.train.launching.stop`). A
second Ctrl-C ends all of them at once.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose modules have the names of others.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import contextlib
import ctypes
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # those that stop a run
PR_SET_PDEATHSIG = 1


def supervise(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a launcher to its end, passing signals to its ranks.

    Args:
        command: of the launcher.
        environment: of the launcher; default: this process's.

    Returns:
        The launcher's exit code; 128 and the signal's number if a signal ended it.
    """
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: a launcher would die of it
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
    interrupts = 0

    def pass_on(number: int, frame: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            _signal_all([*psutil.Process(launcher.pid).children(recursive=True), launcher], signal.SIGKILL)
        else:
            # Without ranks below it, it is still starting, or they run on other machines: it knows what to do.
            _signal_all(ranks_below(launcher.pid) or [launcher], number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS} | {signal.SIGUSR1: ignored}
    try:
        code = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def ranks_below(pid: int) -> list[psutil.Process]:
    """The training processes that a launcher has started: those it gave a RANK, but not what they started."""
    below = psutil.Process(pid).children(recursive=True)
    with_rank = {process.pid for process in below if _has_rank(process)}
    return [process for process in below if process.pid in with_rank and process.ppid() not in with_rank]


def _has_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:  # it has just ended
        return False


def _signal_all(processes: list[Any], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process.send_signal(number)


def _end_with_parent() -> None:
    """In the new process: let the system send it SIGTERM when this one is killed, on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
