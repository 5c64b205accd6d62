"""One budget for all methods: the mean number of visual tokens that a layer of the language model processes.

It counts everything that stands for a picture of one tile: appended tokens and CLS too, and in each layer what is still
there. A method says which options to choose from (`Reducer.budget_choices`); those whose count comes nearest are taken.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

from llava.reduction.base import Reducers
from llava.reduction.options import to_fields, values_of
from llava.reduction.registry import build, method_class, site_of
from llava.reduction.stand_in import StandIn, TowerShape

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""How far from a budget a method may be, as a part of it."""


@dataclass(frozen=True)
class ModelShape:
    """What a budget is about.

    Attributes:
        tower: the vision tower.
        layers: of the language model.
    """

    tower: TowerShape = field(default_factory=TowerShape)
    layers: int = 32

    def entering(self, reducers: Reducers) -> int:
        """Visual tokens of a tile that enter the language model, without ends of rows."""
        if reducers.projector is not None:
            return reducers.projector.token_count(reducers.input_grid(self.tower.grid))
        return int(StandIn(self.tower).reduced(reducers).counts.sum())

    def mean_tokens(self, reducers: Reducers) -> float:
        """Visual tokens of a tile that a layer of the language model processes, the mean over its layers."""
        entered = self.entering(replace(reducers, decoder=None))
        if reducers.decoder is None:
            return entered
        return sum(reducers.decoder.layer_counts(self.layers, entered)) / self.layers


@contextmanager
def without_notes() -> Iterator[None]:
    """For tables that say themselves what a budget was resolved to: nothing is logged about it."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_budget(method: Mapping[str, Any]) -> None:
    """Raise ValueError where a method with a `budget` can't have one, or has other options that say the same."""
    cls = method_class(method["name"])
    budget, name = method["budget"], method["name"]
    if not isinstance(budget, int | float) or isinstance(budget, bool) or budget <= 0:
        raise ValueError(f"method '{name}': budget={budget!r} must be a number above 0: visual tokens a layer")
    choices = cls.budget_choices(576)
    if not choices:
        raise ValueError(f"method '{name}' can't be told a budget; its options are its own")
    options = _own_options(method)
    both = sorted({*choices[0], *cls.budget_conflicts} & set(options))
    if both:
        raise ValueError(f"method '{name}': budget and {', '.join(both)} both say how many tokens stay; leave one out")
    build(name, **options, **choices[-1])


def resolve_budget(method: Mapping[str, Any], before: Reducers, shape: ModelShape) -> dict[str, Any]:
    """The method with its own options in place of `budget`.

    Args:
        method: name and options.
        before: the methods that visual tokens go through before it.
        shape: of the model.

    Raises:
        ValueError: the budget can't be met; the nearest that can is named.
    """
    own = {site: _as_json(getattr(before, site)) for site in ("tower", "encoder", "projector")}
    options = _resolve(json.dumps(dict(method)), json.dumps(own), shape)
    return {"name": method["name"], **options}


@lru_cache(maxsize=256)
def _resolve(method_json: str, before_json: str, shape: ModelShape) -> dict[str, Any]:
    method, own = json.loads(method_json), json.loads(before_json)
    before = Reducers(**{site: cast(Any, build(**options)) for site, options in own.items() if options})
    cls, budget = method_class(method["name"]), method["budget"]
    given, site = _own_options(method), site_of(cls)
    choices = list(cls.budget_choices(shape.entering(before)))

    def mean(place: int) -> float:
        reducer = cls(**to_fields(cls.method, cls, {**given, **choices[place]}))
        return shape.mean_tokens(replace(before, **{site: cast(Any, reducer)}))

    low, high = 0, len(choices) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) <= budget else (low, middle)
    nearest = min((low, high), key=lambda place: abs(mean(place) - budget))
    found = mean(nearest)
    in_words = ", ".join(f"{name}={value}" for name, value in choices[nearest].items())
    if abs(found - budget) > TOLERANCE * budget:
        raise ValueError(
            f"method '{cls.method}': budget={budget:g} visual tokens a layer can't be met; the nearest is {found:.4g}, "
            f"with {in_words}"
        )
    logger.info("budget=%g: %s with %s, %.4g visual tokens a layer", budget, cls.method, in_words, found)
    return {**given, **choices[nearest]}


def _own_options(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key not in ("name", "budget")}


def _as_json(reducer: Any) -> dict[str, Any] | None:
    return None if reducer is None else {"name": reducer.method, **values_of(reducer)}
