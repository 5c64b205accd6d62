"""Options of methods: what their annotations allow, and what is said of the others."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest

from llava.reduction.base import EncoderReducer, VisionFeatures, VisualTokens
from llava.reduction.options import Count, Fraction, Share, Within


class Example(EncoderReducer):
    """A method with an option of each kind."""

    method = "example"
    count: Count = 1
    at_least: Annotated[int, Within(0)] = 0
    fraction: Fraction | None = None
    share: Share = 0.5
    above: Annotated[float, Within(0, excludes_least=True)] = 1.0
    choice: Literal["a", "b"] = "a"
    switch: bool = False
    items: list[Count] | Literal["off", False] | None = None
    lambda_: float = 0.0

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        return VisualTokens(vision.features)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 3, "at_least": 0, "fraction": 1, "share": 0, "above": 5, "choice": "b", "switch": True},
        {"items": [1, 2]},
        {"items": (1, 2)},
        {"items": "off"},
        {"items": False},
        {"fraction": 1e-6},
    ],
)
def test_what_the_annotations_allow(options: dict[str, Any]) -> None:
    reducer = Example(**options)
    assert {name: getattr(reducer, name) for name in options} == options


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("count", 0, "a whole number, 1 or more"),
        ("count", True, "a whole number, 1 or more"),
        ("count", 1.0, "a whole number, 1 or more"),
        ("count", "1", "a whole number, 1 or more"),
        ("at_least", -1, "a whole number, 0 or more"),
        ("fraction", 0, "a number above 0 and at most 1, or null"),
        ("fraction", math.nan, "a number above 0 and at most 1, or null"),
        ("fraction", True, "a number above 0 and at most 1, or null"),
        ("share", 1.5, "a number from 0 to 1"),
        ("share", None, "a number from 0 to 1"),
        ("above", 0, "a number, above 0"),
        ("switch", 1, "true or false"),
        ("items", [1, 0], 'a list, each item a whole number, 1 or more, "off" or false, or null'),
        ("items", 0, 'a list, each item a whole number, 1 or more, "off" or false, or null'),
        ("lambda_", "x", "a number"),
    ],
)
def test_what_they_refuse(option: str, value: object, words: str) -> None:
    with pytest.raises(ValueError) as error:
        Example(**{option: value})
    assert str(error.value) == f"method 'example': {option.rstrip('_')}={value!r} must be {words}"


def test_a_choice_is_listed() -> None:
    with pytest.raises(ValueError, match="choice='c' is not known; choose one of: a, b"):
        Example(choice="c")


def test_options_are_shown() -> None:
    assert "count=2" in repr(Example(count=2))
    assert "lambda=0.0" in repr(Example())
