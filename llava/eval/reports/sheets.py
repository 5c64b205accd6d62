"""What a report shows, as tables of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from llava.eval.reports.comparison import (
    Comparison,
    Notes,
    common_tasks,
    differing_settings,
    joined,
    mean_score,
    relative_score,
    score,
    tasks_of,
)
from llava.eval.reports.findings import Finding
from llava.eval.reports.intervals import Interval
from llava.eval.reports.measured import Result, Run
from llava.eval.reports.published import Figure, Paper, PaperTable
from llava.eval.reports.rendering import Sheet

FIGURE_COLUMNS = ("paper", "table", "model", "method", "tokens", "benchmark", "value")
COMPARISON_COLUMNS = (
    *("benchmark", "run", "method", "table", "model", "trained", "published tokens", "published"),
    *("tokens", "measured", "95 % low", "95 % high", "difference", "within", "questions"),
)
RUN_COLUMNS = (
    *("task", "run", "method", "metric", "score", "95 % low", "95 % high", "relative, %"),
    *("tokens", "tokens, % of all", "TFLOPs", "questions"),
)
COPIED = "*"
DIFFERS = " (!)"
"""Marks a task whose runs differ in a setting; a note says in which."""


def number(value: float | None, form: str = ".1f") -> str:
    """A number as it is shown; a dash for none."""
    return "-" if value is None else format(value, form)


def bounds(interval: Interval | None) -> tuple[str, str]:
    """Low and high end; dashes for none."""
    return ("-", "-") if interval is None else (f"{interval.low:.1f}", f"{interval.high:.1f}")


def figure_sheet(figures: Sequence[Figure]) -> Sheet:
    """A line for each figure, for programs; what a paper does not say is empty."""
    rows = [
        (f.paper, f.table, f.model, f.method, "" if f.tokens is None else f"{f.tokens:g}", f.benchmark, f.printed)
        for f in figures
    ]
    return Sheet(FIGURE_COLUMNS, rows, words=4)


def table_sheet(paper: Paper, table: PaperTable) -> Sheet:
    """A table as the paper has it: a row for each model and method, a column for each benchmark."""
    benchmarks = list(dict.fromkeys(figure.benchmark for figure in table.figures))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for f in table.figures:
        trained = {True: "yes", False: "no", None: ""}[f.trained]
        row = (f.model, f.resolution, f.method, "" if f.tokens is None else f"{f.tokens:g}", trained)
        cells.setdefault(row, {})[f.benchmark] = f.printed + (COPIED if f.copied_from else "")
    rows = [(*row, *(values.get(name, "-") for name in benchmarks)) for row, values in cells.items()]
    return Sheet(
        ("model", "resolution", "method", "tokens", "trained", *benchmarks),
        rows,
        title=f"{paper.name}, table {table.number}: {table.title}".replace("table Figure", "figure"),
        notes=[f"setting: {table.setting}", *table.notes, *_sources(table.figures)],
        words=3,
    )


def _sources(figures: Sequence[Figure]) -> list[str]:
    sources = dict.fromkeys(figure.copied_from for figure in figures if figure.copied_from)
    return [f"{COPIED} copied from: {', '.join(map(str, sources))}"] if sources else []


def comparison_sheet(paper: Paper, comparisons: Sequence[Comparison], notes: Notes, programs: bool) -> Sheet:
    """Measured beside published: a row for each figure of the paper, or for a score that it has not.

    Args:
        paper: of the figures.
        comparisons: in order.
        notes: on tasks, and on tasks of runs; those on neither are keyed by the run.
        programs: write the source of a copied figure, and each row's notes, into it.
    """
    title = f"{paper.name}: measured beside published"
    rows = []
    for c in comparisons:
        more = (_source(c.figure), _note(c, notes)) if programs else ()
        rows.append((c.benchmark, c.run.name, c.run.method, *_published(c, programs), *_measured(c), *more))
    if programs:
        return Sheet((*COMPARISON_COLUMNS, "copied from", "note"), rows, title, joined(notes))
    what = [
        "difference is measured less published; within says whether the published figure lies in the measured score's "
        "95 % interval, which counts the choice of questions alone",
        *_sources([c.figure for c in comparisons if c.figure]),
    ]
    return Sheet(COMPARISON_COLUMNS, rows, title, [*joined(notes), *what], words=6, grouped=True)


def _source(figure: Figure | None) -> str:
    return (figure.copied_from if figure else None) or "-"


def _note(comparison: Comparison, notes: Notes) -> str:
    run, task = comparison.run.name, comparison.result.task
    return "; ".join(text for subject in (task, f"{run}/{task}", run) for text in notes.get(subject, ()))


def _published(comparison: Comparison, programs: bool) -> tuple[str, ...]:
    figure = comparison.figure
    if figure is None:
        return ("-",) * 5
    model = f"{figure.model}, {figure.resolution}" if "patches" in figure.resolution else figure.model
    trained = {True: "yes", False: "no", None: "-"}[figure.trained]
    mark = COPIED if figure.copied_from and not programs else ""
    return ", ".join(comparison.tables), model, trained, number(figure.tokens, "g"), figure.printed + mark


def _measured(comparison: Comparison) -> tuple[str, ...]:
    within = {True: "yes", False: "no", None: "-"}[comparison.within]
    return (
        number(comparison.result.tokens),
        number(comparison.measured, ".2f"),
        *bounds(comparison.interval),
        number(comparison.difference, "+.2f"),
        within,
        str(comparison.result.questions),
    )


def run_sheet(runs: Sequence[Run], baselines: Mapping[str, Run], programs: bool) -> Sheet:
    """The runs' scores task by task, and their means over the tasks that all runs have.

    Args:
        runs: all.
        baselines: the full model's run for a run, by name.
        programs: write each row's notes into it.
    """
    differences = differing_settings(runs)
    shared = common_tasks(runs)
    blocks: dict[str, tuple[str, ...]] = {task: (task,) for task in tasks_of(runs)}
    if len(shared) > 1:
        blocks[f"mean over {len(shared)}"] = tuple(shared)
    rows = []
    for name, tasks in blocks.items():
        note = "; ".join(joined({task: differences[task] for task in tasks if task in differences}))
        label = name + DIFFERS if note and not programs else name
        for run in runs:
            if set(tasks) <= set(run.results):
                cells = _run_cells(run, tasks, baselines.get(run.name))
                rows.append((label, run.name, run.method, *cells, *((note,) if programs else ())))
    notes = joined(differences)
    missing = [run.name for run in runs if run.name not in baselines]
    if missing and len(runs) > 1:
        notes.append(f"no run without reduction to compare with for {', '.join(missing)}; --baseline names one")
    columns = (*RUN_COLUMNS, "note") if programs else RUN_COLUMNS
    return Sheet(columns, rows, "runs", notes, words=4, grouped=True)


def _run_cells(run: Run, tasks: Sequence[str], baseline: Run | None) -> tuple[str, ...]:
    """From the metric on: of one task, or means over several."""
    results = [run.results[task] for task in tasks]
    relative = number(relative_score(run, baseline, tasks))
    costs = (*_cost_cells(results), str(sum(result.questions for result in results)))
    if len(tasks) > 1:
        return "% of full score", number(mean_score(run, tasks), ".2f"), "-", "-", relative, *costs
    main = results[0].main
    ends = bounds(results[0].interval(main)) if main else bounds(None)
    return main or "scored by its server", number(score(run, tasks[0]), ".2f"), *ends, relative, *costs


def _cost_cells(results: Sequence[Result]) -> tuple[str, str, str]:
    """Tokens, their share and TFLOPs, as means over results that all have them."""
    tokens = mean_of([result.tokens for result in results])
    before = mean_of([result.tokens_before for result in results])
    share = 100 * tokens / before if tokens is not None and before else None
    flops = mean_of([result.flops for result in results])
    return number(tokens), number(share), number(None if flops is None else flops / 1e12, ".3g")


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean, or None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def finding_sheet(findings: Sequence[Finding], notes: Sequence[str]) -> Sheet:
    """A row for each finding."""
    rows = [(f.source, f.model, f.method, f.quantity, f"{f.value:.1f}") for f in findings]
    return Sheet(("source", "model", "method", "quantity", "value"), rows, "findings", notes, words=4, grouped=True)
