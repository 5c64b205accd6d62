"""Options of a method are fields of its class, and the annotation of a field says once what it may be.

    class Brightest(EncoderReducer):
        ratio: Fraction = 0.25  # of the patches to keep
        order: Literal["raster", "norm"] = "raster"

Annotations may be int, float, bool, str, Literal, None, list and unions of them; `Within` bounds a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """Bounds of a number.

    Attributes:
        least: the lowest value.
        most: the highest value.
        excludes_least: whether the number must be above `least`.
        excludes_most: whether the number must be below `most`.
    """

    least: float
    most: float = math.inf
    excludes_least: bool = False
    excludes_most: bool = False

    def __contains__(self, value: float) -> bool:
        fits_least = self.least < value if self.excludes_least else self.least <= value
        return fits_least and (value < self.most if self.excludes_most else value <= self.most)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least}" if self.excludes_least else f"{self.least} or more"
        if self.excludes_most:
            return f"from {self.least} to below {self.most}"
        if self.excludes_least:
            return f"above {self.least} and at most {self.most}"
        return f"from {self.least} to {self.most}"


Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Share = Annotated[float, Within(0, 1)]
Fraction = Annotated[float, Within(0, 1, excludes_least=True)]
Variant = Literal["release", "paper"]  # what the authors' code computes, or what their paper says


def option_name(field_name: str) -> str:
    """The name of an option to its users: `lambda_` is `lambda`, which Python keeps for itself."""
    return field_name.rstrip("_")


def to_fields(method: str, cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method by the names of its class's fields.

    `variant: release` is understood by all: a method of one variant has no such option, and is its release.

    Raises:
        ValueError: an unknown option; the known ones are listed.
    """
    known = {option_name(f.name): f.name for f in fields(cls)}
    if "variant" not in known and given.get("variant") == "release":
        given = {name: value for name, value in given.items() if name != "variant"}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"method '{method}' has no option {', '.join(map(repr, unknown))}; it has: {', '.join(known) or 'none'}"
        )
    return {known[name]: value for name, value in given.items()}


def values_of(reducer: Any) -> dict[str, Any]:
    """All options of a reducer by their names."""
    return {option_name(f.name): getattr(reducer, f.name) for f in fields(reducer)}


def check_fields(method: str, reducer: Any) -> None:
    """Compare the options of a reducer with their annotations.

    Raises:
        ValueError: one has another type, or is out of its range; the option and what it may be are named.
    """
    hints = _hints(reducer.__class__)
    for field in fields(reducer):
        hint, value = hints[field.name], getattr(reducer, field.name)
        if _accepts(hint, value):
            continue
        name = option_name(field.name)
        if get_origin(hint) is Literal:
            if not isinstance(value, str) and str(value) in get_args(hint):
                raise ValueError(f"method '{method}': {name}={value!r} is a number: put it in quotes, \"{value}\"")
            allowed = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"method '{method}': {name}={value!r} is not known; choose one of: {allowed}")
        raise ValueError(f"method '{method}': {name}={value!r} must be {_in_words(hint)}")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union stands for; of any other hint, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _accepts(hint: Any, value: object) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_accepts(member, value) for member in members)
    origin = get_origin(hint)
    if origin is Annotated:
        kind, bounds = get_args(hint)
        return _accepts(kind, value) and value in bounds
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is list:
        (item,) = get_args(hint)
        return isinstance(value, list | tuple) and all(_accepts(item, part) for part in value)
    if hint in (int, float):  # True is an int to Python, and not to users
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    members = _members(hint)
    if len(members) > 1:
        *most, last = map(_in_words, members)
        return f"{', '.join(most)}, or {last}"
    origin = get_origin(hint)
    if origin is Annotated:
        kind, bounds = get_args(hint)
        return f"{_in_words(kind)}{' ' if bounds.most < math.inf else ', '}{bounds}"
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    if origin is list:
        return f"a list, each item {_in_words(get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}[hint]
