"""Tiny but complete stand-ins of the benchmarks' files, in LLaVA's layout."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

STANDINS: dict[str, Callable[[Path], None]] = {}
"""For each task, what writes its files into a data folder."""
for _module in pkgutil.iter_modules(__path__):
    STANDINS |= importlib.import_module(f"{__name__}.{_module.name}").STANDINS


def make(name: str, root: Path) -> None:
    """Write the files of a task into the data folder `root`."""
    STANDINS[name](root)
