"""The extension that DeepSpeed compiles for runs on the CPU, and the lock that a killed compilation leaves.

torch's lock is a file that its owner keeps open, and that all others wait for without end or a word. What no process
has open is nobody's.
"""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

NAME = "deepspeed_shm_comm"


def prepare_extension(root: str | Path | None = None) -> None:
    """Say that the extension will be compiled, where it was not yet, and remove a lock that nobody holds.

    Args:
        root: folder of compiled extensions; default: torch's (TORCH_EXTENSIONS_DIR).
    """
    folders = list(Path(root or get_default_build_root()).glob(f"**/{NAME}"))
    for lock in [folder / "lock" for folder in folders]:
        if lock.exists() and not is_held(lock):
            logger.warning("%s was left by a compilation that was killed: it is removed", lock)
            lock.unlink(missing_ok=True)
    if not any((folder / f"{NAME}.so").is_file() for folder in folders):
        logger.info("DeepSpeed compiles its extension for the CPU, once: about a minute")


def is_held(lock: Path) -> bool:
    """Whether a process of this machine has a file open."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock.resolve() for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue
    return False
