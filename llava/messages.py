"""What a command says on the terminal: its own messages and all errors. What libraries say besides goes to a log."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

SHORT, LONG = "%(asctime)s %(message)s", "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PENDING = MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


class _Terminal(logging.Handler):
    """Writes to stderr, above a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: record.name.split(".")[0] == "llava" or record.levelno >= logging.ERROR)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else "%(levelname)s: "
        return logging.Formatter(SHORT.replace("%(message)s", f"{level}%(message)s"), "%H:%M:%S").format(record)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):  # a closed terminal
            self.handleError(record)


class _Quiet(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing: what must be written says that the disk is full."""


def set_up_messages(level: int = logging.INFO) -> None:
    """Show what this program says from `level` on, and errors of libraries; hide their warnings and progress bars.

    With LLAVA_DEBUG in the environment everything is shown.
    """
    logging.getLogger("llava").setLevel(level)
    if os.environ.get("LLAVA_DEBUG"):
        logging.basicConfig(format=LONG, datefmt="%H:%M:%S", stream=sys.stderr)
        return
    root = logging.getLogger()
    if not any(isinstance(handler, _Terminal) for handler in root.handlers):
        root.addHandler(_Terminal())
    logging.captureWarnings(True)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:  # which has read the variable
        sys.modules["datasets"].disable_progress_bars()
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as of_transformers

    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    of_transformers.disable_progress_bar()
    enable_progress_bars()  # transformers turns these off too; a download takes long


def divert_libraries() -> None:
    """Keep what libraries log, warn of and print to stdout, C++ included, for the file that `open_log` names."""
    if os.environ.get("LLAVA_DEBUG"):
        return
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(_PENDING)
    sys.stdout.flush()
    with tempfile.TemporaryFile() as early:
        os.dup2(early.fileno(), 1)


def open_log(file: Path) -> bool:
    """Append to this file what `divert_libraries` kept, and all that comes.

    Returns:
        False where nothing was kept, and so no file is written.
    """
    root = logging.getLogger()
    if _PENDING not in root.handlers:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.open("a", encoding="utf-8", buffering=1, errors="replace")
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "rb") as early:
        early.seek(0)
        log.write(early.read().decode(errors="replace"))
    os.dup2(log.fileno(), 1)
    handler = _Quiet(log)
    handler.setFormatter(logging.Formatter(LONG))
    _PENDING.setTarget(handler)
    _PENDING.flush()
    root.removeHandler(_PENDING)
    root.addHandler(handler)
    of_deepspeed = logging.getLogger("DeepSpeed")
    of_deepspeed.handlers.clear()
    of_deepspeed.propagate = True
    return True
