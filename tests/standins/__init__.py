"""Small stand-ins of the benchmarks' data, in the layout of docs/evaluation.md: a few questions, tiny pictures."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

STANDINS: dict[str, Callable[[Path], None]] = {
    name: function
    for module in iter_modules(__path__)
    for name, function in getattr(import_module(f"{__name__}.{module.name}"), "STANDINS", {}).items()
}
"""By task, what writes its files; each module of this folder may have some."""


def make(name: str, root: Path) -> None:
    """Write the stand-in of a task.

    Args:
        name: of the task.
        root: the data folder, as `playground/data/eval`.
    """
    STANDINS[name](root)
