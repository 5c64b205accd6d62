"""`llava report`: a paper's tables, runs beside them, runs among themselves."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.reports.comparison import Comparison, Notes, baselines, caveats, compare, differing_settings, joined
from llava.eval.reports.findings import measured_findings, published_findings
from llava.eval.reports.measured import Run, load_runs
from llava.eval.reports.plotting import plot
from llava.eval.reports.published import UNREDUCED, Figure, Paper, load_paper
from llava.eval.reports.rendering import FORMATS, Sheet, render
from llava.eval.reports.sheets import comparison_sheet, figure_sheet, finding_sheet, run_sheet, table_sheet
from llava.files import atomic_folder

logger = logging.getLogger(__name__)

SUFFIXES = {".csv": "csv", ".md": "markdown"}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        paper: one of `published.PAPERS`; None: runs alone.
        table: number of one of its tables; None: all.
        form: one of `rendering.FORMATS`; None: what the output's suffix says, otherwise a table.
        findings: compute what the papers claim beyond accuracy, in place of the tables.
        baseline: name or folder of the run that relative performance refers to.
        model: of the paper, where the runs' own names should not count.
        method: of the paper, for all runs with a reduction, or as RUN=METHOD for one.
        output: file for the report; None: standard output.
        plot: file for a picture of the runs.
    """

    paper: str | None = None
    table: str | None = None
    form: str | None = None
    findings: bool = False
    baseline: str | None = None
    model: str | None = None
    method: Sequence[str] = ()
    output: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, *FORMATS):
            raise ValueError(f"--format {self.form}: choose {', '.join(FORMATS)}")
        if self.paper is None:
            for name in ("table", "model", "method"):
                if getattr(self, name):
                    raise ValueError(f"--{name} says which figures of a paper to show; --paper is missing")


def report(folders: Sequence[Path], options: ReportOptions) -> None:
    """Write a report.

    Args:
        folders: of runs.
        options: see `ReportOptions`.

    Raises:
        ValueError: nothing to report, or an option or file is not what it should be.
    """
    if not folders and options.paper is None:
        raise ValueError("nothing to report: name the folders of runs, --paper, or both")
    if not folders and (options.plot or options.baseline):
        raise ValueError("--plot and --baseline are about runs: name their folders")
    form = options.form or SUFFIXES.get(options.output.suffix if options.output else "", "table")
    runs = load_runs(folders)
    sheets = make_sheets(runs, options, form)
    if options.plot:
        plot(runs, options.plot, joined(differing_settings(runs)))
    if form == "csv" and runs:
        for note in (note for sheet in sheets for note in sheet.notes):
            logger.warning(note)
    _write(sheets, form, options.output)


def make_sheets(runs: Sequence[Run], options: ReportOptions, form: str) -> list[Sheet]:
    """The tables of a report, as `report` describes its arguments."""
    programs = form == "csv"
    paper = load_paper(options.paper) if options.paper else None
    tables = () if paper is None else paper.tables if options.table is None else (paper.table(options.table),)
    figures = [figure for table in tables for figure in table.figures]
    if options.findings:
        found = [*published_findings(tables), *measured_findings(runs, baselines(runs, options.baseline))]
        return [finding_sheet(found, joined(differing_settings(runs)))]
    if paper is None:
        return [run_sheet(runs, baselines(runs, options.baseline), programs)]
    if runs:
        comparisons, notes = _compare(runs, paper, figures, options)
        notes = {**notes, **caveats(runs), **differing_settings(runs)}
        return [comparison_sheet(paper, comparisons, notes, programs)]
    if programs:
        return [figure_sheet(figures)]
    return [table_sheet(paper, table) for table in tables]


def _compare(
    runs: Sequence[Run], paper: Paper, figures: Sequence[Figure], options: ReportOptions
) -> tuple[list[Comparison], Notes]:
    """All comparisons, by benchmark, and for each run what could not be compared."""
    found: list[Comparison] = []
    notes: Notes = {}
    names = _method_names(runs, options.method, {figure.method for figure in figures})
    for run in runs:
        model, method = options.model or run.model, names[run.name]
        own = compare(run, figures, model=model, method=method)
        found += own
        if model is None:
            notes[run.name] = ["the results do not say which model of the papers this is; --model names it"]
        elif not any(comparison.figure for comparison in own):
            notes[run.name] = [f"{paper.name} has no figure of {model} with method {method} on these tasks"]
    order = list(dict.fromkeys(figure.benchmark for figure in figures))
    return sorted(found, key=lambda comparison: order.index(comparison.benchmark)), notes


def _method_names(runs: Sequence[Run], given: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """The paper's name of each run's method: its own, or as it is given for all reduced runs or for this one.

    Raises:
        ValueError: a name that is given is none of `known`, the paper's.
    """
    names = {run.name: run.method for run in runs}
    for text in given:
        run, equals, method = text.partition("=")
        for_one = bool(equals) and run in names  # the papers' names may have an equals sign too
        if (method if for_one else text) not in known:
            raise ValueError(
                f"--method {text}: expected METHOD or RUN=METHOD, a run among {', '.join(names)}, and a method of the "
                f"tables: {', '.join(sorted(known))}"
            )
        if for_one:
            names[run] = method
        else:
            names = {run: name if name == UNREDUCED else text for run, name in names.items()}
    return names


def _write(sheets: Sequence[Sheet], form: str, output: Path | None) -> None:
    if output is None:
        render(sheets, form, sys.stdout)
        return
    text = io.StringIO()
    render(sheets, form, text)
    with atomic_folder(output.absolute().parent) as staging:
        (staging / output.name).write_text(text.getvalue(), encoding="utf-8")
