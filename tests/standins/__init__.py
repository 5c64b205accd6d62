"""Tiny but complete stand-ins of the benchmarks' files, in LLaVA's layout."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

STANDINS: dict[str, Callable[[Path], None]] = {}
for _module in iter_modules(__path__):
    STANDINS |= import_module(f"{__name__}.{_module.name}").STANDINS


def make(name: str, root: Path) -> None:
    """Write the files of a task below `root`, the data folder."""
    STANDINS[name](root)
