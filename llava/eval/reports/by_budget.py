"""What papers print of a method at a number of visual tokens, to stand beside what a run of ours gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava.eval.reports.published import (
    AVERAGE,
    METHOD_NAMES,
    PAPERS,
    UNREDUCED,
    Figure,
    Paper,
    PaperTable,
    load_paper,
)
from llava.reduction.registry import method_class

MODEL = "LLaVA-1.5-7B"
ORIGINS = ("own", "re-run", "copied", "not said")


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A method's row of a paper's table.

    Attributes:
        method: our name of it.
        printed: the paper's, which may name a variant; ‡ and † are trained ones.
        tokens: the label that the paper gives the row, or the mean that it states; None where it has neither.
        origin: one of `ORIGINS`: of the paper's own method, run by this paper, or taken from another; "not said" where
            the paper does not tell.
        copied_from: the work from which it was taken, where that is known.
        trained: whether the model was trained with the method; None where that is not said.
        options: what `--reduction` is told for the same setting; None where the setting is not known.
        scores: as printed, by the benchmark's name of `published.BENCHMARKS`.
        average: the table's own mean; tables differ in what they average.
        kept: mean of the scores in percent of the full model's of the table; None where it has no full model.
        source: title, venue and table.
    """

    method: str
    printed: str
    tokens: float | None
    origin: str
    copied_from: str | None
    trained: bool | None
    options: Mapping[str, Any] | None
    scores: Mapping[str, float]
    average: float | None
    kept: float | None
    source: str


def published(method: str, budget: float | None = None, model: str = MODEL) -> list[PublishedRow]:
    """What the papers here print of a method, in the order of `PAPERS`.

    A label is no cost: of "192" each paper and release has its own count, from 192 to 220 tokens a layer; see
    docs/benchmarks.md. `options` says what a row's method was told, and `budget` of `--reduction` is not it.

    Args:
        method: our name.
        budget: the row's `tokens`, as 192, 128 or 64; None for all rows, those without a number too.
        model: as the papers name it.

    Raises:
        ValueError: there is no such method; the known ones are listed.
    """
    method_class(method)
    name = METHOD_NAMES.get(method, method)
    rows = (row for paper in map(load_paper, PAPERS) for table in paper.tables for row in _rows(paper, table, model))
    return [
        _as_row(method, paper, table, figures, full)
        for paper, table, figures, full in rows
        if base_name(figures[0].method) == name and (budget is None or figures[0].tokens == budget)
    ]


def base_name(printed: str) -> str:
    """A paper's name of a method without marks and what stands in parentheses: VisionZip of "VisionZip‡"."""
    return re.sub(r"[‡†]$| \(.*\)$", "", printed)


_Row = tuple[Paper, PaperTable, list[Figure], dict[str, float]]


def _rows(paper: Paper, table: PaperTable, model: str) -> Iterator[_Row]:
    rows: dict[tuple[object, ...], list[Figure]] = {}
    for figure in table.figures:
        if figure.model == model:
            key = (figure.resolution, figure.method, figure.tokens, figure.trained)
            rows.setdefault(key, []).append(figure)
    full = next((_scores(figures) for figures in rows.values() if figures[0].method == UNREDUCED), {})
    for figures in rows.values():
        yield paper, table, figures, full


def _scores(figures: list[Figure]) -> dict[str, float]:
    return {figure.benchmark: figure.value for figure in figures if figure.is_score}


def _as_row(
    method: str, paper: Paper, table: PaperTable, figures: list[Figure], full: dict[str, float]
) -> PublishedRow:
    first, scores = figures[0], _scores(figures)
    copied_from = next((figure.copied_from for figure in figures if figure.copied_from), None)
    is_own = base_name(first.method) in paper.own
    shares = [100 * value / full[benchmark] for benchmark, value in scores.items() if benchmark in full]
    options = paper.options.get(first.method, {})
    return PublishedRow(
        method=method,
        printed=first.method,
        tokens=first.tokens,
        origin="copied" if copied_from else "own" if is_own else paper.others or "not said",
        copied_from=copied_from,
        trained=first.trained,
        options=None if first.tokens is None else options.get(first.tokens),
        scores=scores,
        average=next((figure.value for figure in figures if figure.benchmark == AVERAGE), None),
        kept=fmean(shares) if shares else None,
        source=f"{paper.title}, {paper.venue}, table {table.number}",
    )
