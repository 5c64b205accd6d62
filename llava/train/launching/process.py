"""What a training process does at its beginning and at its end."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed

from llava.messages import divert_libraries, open_log, set_up_messages
from llava.train.checkpoints.folders import CannotWriteError, write_errors_named
from llava.train.launching.stop import SIGNALS, RunStoppedError

# How a training process ends, besides 0; the values of the last two are those of sysexits.h.
EXIT_LOST = 1  # another rank ended before
EXIT_MISTAKE = 2  # flags, data or checkpoints do not fit
EXIT_CANNOT_WRITE = os.EX_IOERR  # 74: the disk is full, or a folder can't be written to
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: stopped by a signal, with a checkpoint; the same command goes on from there

# What Gloo and NCCL raise in a collective when the process at the other end is gone.
PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exit",
    "Timed out waiting",
)
SECONDS_FOR_THE_LAUNCHER = 3


def set_up_logging() -> None:
    """The first process says what happens, the others warnings only; what libraries say is kept for `open_run_log`."""
    first = os.environ.get("RANK", "0") == "0"
    set_up_messages(logging.INFO if first else logging.WARNING)
    divert_libraries()


def open_run_log(output_dir: str) -> None:
    """Write what libraries say in this process to a file in the folder of its run, and tell where that is."""
    file = Path(output_dir, "logs", f"rank-{os.environ.get('RANK', '0')}.log")
    with write_errors_named(file, output_dir):
        if open_log(file):
            logging.getLogger(__name__).info("what libraries say goes to %s, each step to metrics.jsonl", file)


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none, so that it does not guess with a warning."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def remove_shared_buffer(rank: int, address: str, port: str) -> None:
    """Give back the memory (69 MB) in which DeepSpeed's ranks on the CPU add up; DeepSpeed leaves it behind.

    Args:
        rank: whose buffer; ranks that still use it keep it.
        address: MASTER_ADDR of the run.
        port: MASTER_PORT of the run.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, whatever threads still run in it.

    On the CPU, collectives run in threads of Gloo. When one is done, the waiting caller goes on at once, and only
    then does the thread let go of the tensors, for which it needs the interpreter's lock. After the last
    collective of a ZeRO-3 run, the gathering of weights to be written, the ranks that do not write are at their
    end within milliseconds. If the interpreter is being finalized by the time the thread asks for the lock,
    Python ends the thread, in the middle of a C++ destructor: "terminate called without an active exception",
    and the process aborts (-6) although everything is trained and written. Destroying the process group would
    join the threads, but only when nobody holds it any more, and each of ZeRO-3's parameters does. So the process
    runs its exit handlers, and ends without finalizing the interpreter.
    """
    for number in SIGNALS:  # what was to be written is: a signal now would only change the exit code
        signal.signal(number, signal.SIG_IGN)
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        remove_shared_buffer(int(os.environ["RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if is_distributed and "gloo" in torch.distributed.get_backend():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if is_distributed and code in (0, EXIT_STOPPED):
        torch.distributed.destroy_process_group()
    sys.exit(code)


def lost_peer(error: RuntimeError) -> str | None:
    """What a collective has raised because another rank ended, which says itself why; None for other errors."""
    if not torch.distributed.is_initialized():
        return None
    return next((words for words in PEER_IS_GONE if words in str(error)), None)


def run_and_report(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run `main`; what the user can mend, or another rank's end, becomes one line of log in place of a traceback.

    Args:
        main: the program.
        argv: its arguments; with LLAVA_DEBUG set in the environment the traceback is shown.

    Returns:
        The exit code: 0, or one of those above.
    """
    logger = logging.getLogger("llava")
    try:
        main(argv)
    except RunStoppedError as stop:
        logger.warning("%s", stop)
        return EXIT_STOPPED
    except (ValueError, CannotWriteError) as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        logger.error("%s (LLAVA_DEBUG=1 shows where)", error)
        return EXIT_CANNOT_WRITE if isinstance(error, CannotWriteError) else EXIT_MISTAKE
    except RuntimeError as error:
        lost = lost_peer(error)
        if os.environ.get("LLAVA_DEBUG") or lost is None:
            raise
        logger.warning(
            "rank %d ends because another has ended, which says why (%s)", torch.distributed.get_rank(), lost
        )
        time.sleep(SECONDS_FOR_THE_LAUNCHER)  # it passes on the exit code of the rank that it finds ended first
        return EXIT_LOST
    return 0
