"""Names of the methods. A name is matched exactly, and a class is registered once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from llava.reduction.base import DecoderReducer, EncoderReducer, ProjectorReducer, Reducer, TowerReducer
from llava.reduction.options import to_fields

SITES: dict[str, type[Reducer]] = {
    "tower": TowerReducer,
    "encoder": EncoderReducer,
    "projector": ProjectorReducer,
    "decoder": DecoderReducer,
}
ENTRY_POINTS = "llava.reducers"
"""The group of entry points under which an installed package has methods: `name = "module:Class"`."""
_METHODS: dict[str, type[Reducer]] = {}

R = TypeVar("R", bound=type[Reducer])


def register(name: str) -> Callable[[R], R]:
    """Class decorator: make a reducer known by `name`.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: R) -> R:
        if name in _METHODS:
            raise ValueError(f"the method name '{name}' is taken by {_METHODS[name].__qualname__}")
        _METHODS[name] = cls
        cls.method = name
        return cls

    return add


def site_of(cls: type[Reducer]) -> str:
    """The site ("tower", "encoder", "projector" or "decoder") that a reducer class belongs to."""
    return next(site for site, base in SITES.items() if issubclass(cls, base))


def available() -> dict[str, list[str]]:
    """Names of all methods, by site; those of installed packages too."""
    _load_installed()
    return {
        site: sorted(name for name, cls in _METHODS.items() if issubclass(cls, base)) for site, base in SITES.items()
    }


@cache
def _load_installed() -> None:
    """Import the methods that installed packages have under the entry-point group `llava.reducers`.

    Raises:
        ValueError: one can't be imported, or is no method; its package is named.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            cls = point.load()
        except Exception as error:  # whatever another package's import raises
            raise ValueError(
                f"the reduction method '{point.name}' of the installed package {_package(point)} can't be imported: "
                f"{error!r}. Mend or uninstall that package"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Reducer)):
            raise ValueError(f"{point.value} of the installed package {_package(point)} is no class of a reducer")
        if cls not in _METHODS.values():
            register(point.name)(cls)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _find(name: str) -> type[Reducer] | None:
    if ":" in name:
        return _import(name)
    if name not in _METHODS:
        _load_installed()
    return _METHODS.get(name)


def is_loaded(name: str) -> bool:
    """Whether a method needs no further import: True but for `module:Class` of a module that nobody has imported."""
    return name.partition(":")[0] in sys.modules if ":" in name else True


def _import(name: str) -> type[Reducer]:
    """The class that `module:Class` names.

    Raises:
        ValueError: no such module or class, or it is no reducer.
    """
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reduction method {name!r}: {error}; expected MODULE:CLASS that can be imported") from error
    if not (isinstance(cls, type) and any(issubclass(cls, base) for base in SITES.values())):
        raise ValueError(f"reduction method {name!r} is no subclass of {', '.join(b.__name__ for b in SITES.values())}")
    found: type[Reducer] = cls
    found.method = found.method or name
    return found


def method_class(name: str, site: str | None = None) -> type[Reducer]:
    """The class registered as `name`.

    Args:
        name: the method's exact name; or `module:Class` of one in another package, which is imported.
        site: where the method is asked to work, if that is given.

    Raises:
        ValueError: no such method (the known ones are listed), or it works at another site.
    """
    cls = _find(name) if isinstance(name, str) else None
    if cls is None:
        known = "; ".join(f"{s}: {', '.join(names)}" for s, names in available().items() if names)
        raise ValueError(f"unknown reduction method {name!r}; known methods are: {known}")
    if site is not None and site_of(cls) != site:
        raise ValueError(f"method '{name}' works at the site '{site_of(cls)}', not '{site}'; move it there")
    return cls


def build(name: str, **options: object) -> Reducer:
    """Make a reducer from its name and options, e.g. `build("prumerge", ratio=0.25)`.

    Raises:
        ValueError: unknown method or option, or a value out of range.
    """
    cls = method_class(name)
    return cls(**to_fields(name, cls, options))
