"""What a training process does at its beginning and at its end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed

# Said by libraries about one another at every run, and nothing a user can mend.
NOISE = (
    ".*is_gradient_checkpointing. is deprecated.*",
    ".*torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated.*",
)
# ZeRO-3 hooks into the inputs and outputs of modules, and cannot look into this class; it sees the tensors where
# they enter and leave the modules inside, which hold all the weights.
DEEPSPEED_NOISE = "A module has unknown inputs or outputs type (<class 'llava.reduction.base."
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging() -> None:
    """Log to the terminal: the first process what happens, the others warnings only."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message, FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(lambda record: DEEPSPEED_NOISE not in record.getMessage())
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format=FORMAT, datefmt="%H:%M:%S", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("llava").setLevel(logging.INFO if first else logging.WARNING)


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none, so that it does not guess with a warning."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and "gloo" in torch.distributed.get_backend():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if is_distributed and code == 0:
        torch.distributed.destroy_process_group()
    sys.exit(code)


def run_and_report(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run `main`; a ValueError, which says what to mend, becomes one line of log in place of a traceback.

    Args:
        main: the program.
        argv: its arguments; with LLAVA_DEBUG set in the environment the traceback is shown.

    Returns:
        The exit code: 0, or 2 for a ValueError.
    """
    try:
        main(argv)
    except ValueError as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        logging.getLogger("llava").error("%s (LLAVA_DEBUG=1 shows where)", error)
        return 2
    return 0
