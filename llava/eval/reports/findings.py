"""What the papers claim beyond accuracy, computed: tokens by task, their share, relative performance, means, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from llava.eval.reports.comparison import common_tasks, mean_score, relative_score
from llava.eval.reports.measured import Run
from llava.eval.reports.published import AVERAGE, COSTS, UNREDUCED, Figure, PaperTable, in_percent

TOKENS = "visual tokens"
SHARE = "visual tokens, % of all"
RELATIVE = "relative performance, %"
MEAN = "mean over {} tasks"

Row = dict[str, Figure]
"""A row of a paper's table: figures by benchmark."""


@dataclass(frozen=True)
class Finding:
    """One computed number.

    Attributes:
        source: a table of the paper, or a run.
        model, method: it is about.
        quantity: what the number says.
        value: the number.
    """

    source: str
    model: str
    method: str
    quantity: str
    value: float


def published_findings(tables: Sequence[PaperTable]) -> list[Finding]:
    """What follows from a paper's tables, for each row that a reduced model has.

    The full model is the row of the same table, model and resolution without reduction.
    """
    found = []
    for table in tables:
        rows = _rows(table)
        for (model, resolution, method), row in rows.items():
            full = rows.get((model, resolution, UNREDUCED), {})
            name = f"{model}, {resolution}" if "patches" in resolution else model
            quantities = {**_token_findings(row, full), **_score_findings(row, full), **_cost_findings(row, full)}
            if method != UNREDUCED:
                source = f"table {table.number}" if table.number.isdigit() else table.number
                found += [Finding(source, name, method, quantity, value) for quantity, value in quantities.items()]
    return found


def _rows(table: PaperTable) -> dict[tuple[str, str, str], Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for figure in table.figures:
        key = (figure.model, figure.resolution, figure.method)
        # Two rows of one name differ in their tokens (25 % and 50 % of them): the tokens tell them apart.
        if figure.benchmark in rows.get(key, {}):
            key = (figure.model, figure.resolution, f"{figure.method}, {figure.tokens:g} tokens")
        rows.setdefault(key, {})[figure.benchmark] = figure
    return rows


def _token_findings(row: Row, full: Row) -> dict[str, float]:
    counts = {name: figure.tokens for name, figure in row.items() if figure.tokens is not None}
    if not counts:
        return {}
    by_task = {f"{TOKENS}, {name}": count for name, count in counts.items()} if len(set(counts.values())) > 1 else {}
    mean = fmean(counts.values())
    before = {figure.tokens for figure in full.values()} - {None}
    share = {SHARE: 100 * mean / fmean(count for count in before if count)} if before else {}
    return by_task | {TOKENS: mean} | share


def _score_findings(row: Row, full: Row) -> dict[str, float]:
    scores = {name: figure.value for name, figure in row.items() if figure.is_score}
    if not scores:
        return {}
    shared = [name for name in scores if name in full]
    relative = {RELATIVE: fmean(100 * scores[name] / full[name].value for name in shared)} if shared else {}
    printed = {"mean as printed": row[AVERAGE].value} if AVERAGE in row else {}
    mean = fmean(in_percent(name, value) for name, value in scores.items())
    return relative | {MEAN.format(len(scores)): mean} | printed


def _cost_findings(row: Row, full: Row) -> dict[str, float]:
    shared = [name for name in COSTS if name in row and name in full]
    return {f"{name}, % of the full model's": 100 * row[name].value / full[name].value for name in shared}


def measured_findings(runs: Sequence[Run], baselines: Mapping[str, Run]) -> list[Finding]:
    """The same of runs; the tokens of each task are those of its images, and their mean is over tasks.

    Args:
        runs: all; means are over the tasks that they share.
        baselines: the full model's run for a run, by name.
    """
    shared = common_tasks(runs)
    found = []
    for run in runs:
        quantities = dict(_measured_tokens(run))
        relative = relative_score(run, baselines.get(run.name), shared)
        if relative is not None:
            quantities[RELATIVE] = relative
        if shared:
            quantities[MEAN.format(len(shared))] = mean_score(run, shared)
        name = run.model or "-"
        found += [Finding(run.name, name, run.method, quantity, value) for quantity, value in quantities.items()]
    return found


def _measured_tokens(run: Run) -> Iterator[tuple[str, float]]:
    counts = {task: r.tokens for task, r in run.results.items() if r.tokens is not None}
    before = [r.tokens_before for r in run.results.values() if r.tokens is not None and r.tokens_before]
    yield from ((f"{TOKENS}, {task}", count) for task, count in counts.items())
    if counts:
        yield TOKENS, fmean(counts.values())
    if counts and len(before) == len(counts):
        yield SHARE, 100 * fmean(counts.values()) / fmean(before)
