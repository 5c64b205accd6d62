"""What a training process does at its beginning and at its end."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed

# Said by libraries about one another at every run, and nothing a user can mend.
NOISE = (
    ".*is_gradient_checkpointing. is deprecated.*",
    ".*torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated.*",
)
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging() -> None:
    """Log to the terminal: the first process what happens, the others warnings only."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message, FutureWarning)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format=FORMAT, datefmt="%H:%M:%S", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("llava").setLevel(logging.INFO if first else logging.WARNING)


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none, so that it does not guess with a warning."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def finish_process() -> None:
    """Stop the threads of the process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


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
