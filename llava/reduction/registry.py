"""Names of the methods. A name is matched exactly, and a class is registered once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llava.reduction.base import DecoderReducer, EncoderReducer, ProjectorReducer, Reducer, TowerReducer
from llava.reduction.options import to_fields

SITES: dict[str, type[Reducer]] = {
    "tower": TowerReducer,
    "encoder": EncoderReducer,
    "projector": ProjectorReducer,
    "decoder": DecoderReducer,
}
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
    """Names of all methods, by site."""
    return {
        site: sorted(name for name, cls in _METHODS.items() if issubclass(cls, base)) for site, base in SITES.items()
    }


def method_class(name: str, site: str | None = None) -> type[Reducer]:
    """The class registered as `name`.

    Args:
        name: the method's exact name.
        site: where the method is asked to work, if that is given.

    Raises:
        ValueError: no such method (the known ones are listed), or it works at another site.
    """
    cls = _METHODS.get(name) if isinstance(name, str) else None
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
