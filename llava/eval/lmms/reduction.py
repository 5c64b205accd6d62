"""A reduction from lmms-eval's `--model_args`, which are one line of NAME=VALUE with commas between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from llava.reduction.config import ReductionConfig
from llava.yaml_text import read_yaml


def parse_reduction(reduction: Any, sites: Mapping[str, Any], options: Mapping[str, Any]) -> ReductionConfig | None:
    """The reduction that model arguments ask for; None for the checkpoint's own.

    Args:
        reduction: a method's name, `none` for all tokens, or a mapping that `ReductionConfig.parse` reads, such as
            `{encoder: trim, decoder: {name: pyramiddrop, stages: 4}}`; lmms-eval leaves commas inside of braces alone.
        sites: for encoder, projector and decoder a method's name or `{name: trim, ratio: 0.25}`, or None.
        options: of the method that `reduction` names: `reduction=prumerge,ratio=0.25`.

    Raises:
        ValueError: an unknown method or option, or arguments that exclude each other; they are named.
    """
    given = {site: method for site, method in sites.items() if method is not None}
    if reduction is not None and given:
        raise ValueError(f"reduction={reduction} and {', '.join(given)} exclude each other: leave one out")
    if not options:
        return ReductionConfig.parse(given or reduction) if given or reduction is not None else None
    names = ", ".join(options)
    if not isinstance(reduction, str) or reduction == "none" or not reduction.replace("_", "").isalnum():
        raise ValueError(
            f"{names}: no argument of this model, and an option only of a method that is named: "
            "reduction=prumerge,ratio=0.25, or encoder={name: prumerge, ratio: 0.25}"
        )
    return ReductionConfig.parse({"name": reduction, **{name: _value(name, text) for name, text in options.items()}})


def _value(name: str, value: Any) -> Any:
    """An option's value; lmms-eval has read numbers, and lists are still text."""
    try:
        return read_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={value!r} is neither a number, a list nor a text") from error
