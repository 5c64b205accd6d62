"""How far a score could lie from its true value by the choice of questions alone: intervals of 95 percent."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llava.eval.tasks.base import Grade

LEVEL = 0.95
RESAMPLES = 1000

Summarize = Callable[[Sequence[Grade]], Mapping[str, float]]
"""From grades to metrics: `llava.eval.tasks.Task.summarize`."""


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, both included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        return self.low <= value <= self.high


def wilson(right: int, asked: int) -> Interval:
    """Wilson's interval of an accuracy, in percent, for `right` of `asked` independent questions.

    Raises:
        ValueError: there are no questions, or more right ones than asked.
    """
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right of {asked} questions: expected 0 to all of at least one")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = right / asked
    center = share + z * z / (2 * asked)
    reach = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 100 / (1 + z * z / asked)
    low, high = scale * (center - reach), scale * (center + reach)
    return Interval(low if right else 0.0, high if right < asked else 100.0)  # the ends are exact


def bootstrap(
    grades: Sequence[Grade],
    groups: Sequence[Hashable | None],
    summarize: Summarize,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of all metrics, by drawing questions again with replacement.

    Args:
        grades: of all questions.
        groups: of the same length; questions of one group are drawn together. None: the question stands alone.
        summarize: makes the metrics.
        resamples: how often all questions are drawn.
        seed: of the draws; the same one gives the same intervals.
    """
    clusters: dict[Hashable, list[Grade]] = {}
    for place, (grade, group) in enumerate(zip(grades, groups, strict=True)):
        clusters.setdefault(("alone", place) if group is None else ("group", group), []).append(grade)
    sets = list(clusters.values())
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(resamples if sets else 0):
        drawn = generator.integers(len(sets), size=len(sets))
        for name, value in summarize([grade for index in drawn for grade in sets[index]]).items():
            found.setdefault(name, []).append(value)
    edges = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
    return {name: Interval(*map(float, np.percentile(values, edges))) for name, values in found.items()}
