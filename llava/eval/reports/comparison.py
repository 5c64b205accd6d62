"""What may be put side by side: a run and a paper's figures, and runs among themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava.eval.reports.intervals import Interval
from llava.eval.reports.measured import Result, Run
from llava.eval.reports.published import UNREDUCED, Figure, in_percent

# Entries of a result's settings that change what is measured.
SETTINGS = {
    "conv_mode": "conv_mode",
    "temperature": "temperature",
    "top_p": "top_p",
    "num_beams": "num_beams",
    "max_new_tokens": "max_new_tokens",
    "image_aspect_ratio": "image_aspect_ratio",
    "frames": "frames",
    "no_images": "no_images",
    "questions_sha256": "the questions (questions_sha256)",
}


@dataclass(frozen=True)
class Comparison:
    """A score of a run, with a figure of a paper where there is one.

    Attributes:
        run, result: where the score is from.
        benchmark: the paper's name of it.
        metric: the run's name of it.
        measured: the score.
        figure: of the paper; None: it has none for this model, method and benchmark.
        tables: of the paper that print this figure.
    """

    run: Run
    result: Result
    benchmark: str
    metric: str
    measured: float
    figure: Figure | None = None
    tables: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        return None if self.figure is None else self.measured - self.figure.value

    @property
    def interval(self) -> Interval | None:
        """Of the measured score."""
        return self.result.interval(self.metric)

    @property
    def within(self) -> bool | None:
        """Whether the published figure lies in the measured score's interval; None where one of them is missing."""
        if self.figure is None or self.interval is None:
            return None
        return self.interval.holds(self.figure.value)


def compare(run: Run, figures: Sequence[Figure], *, model: str | None, method: str) -> list[Comparison]:
    """A run's scores on benchmarks of a paper, each with every figure of that model and method.

    Args:
        run: measured.
        figures: of the paper, or of one of its tables.
        model, method: under the paper's names.
    """
    known = {figure.benchmark for figure in figures}
    found = []
    for result in run.results.values():
        for benchmark, metric in result.published.items():
            measured = result.metric(metric)
            if benchmark not in known or measured is None:
                continue
            score = (run, result, benchmark, metric, measured)
            rows = [f for f in figures if (f.model, f.method, f.benchmark) == (model, method, benchmark)]
            found += [Comparison(*score, figure, tables) for figure, tables in _distinct(rows)] or [Comparison(*score)]
    return found


def _distinct(figures: Iterable[Figure]) -> list[tuple[Figure, tuple[str, ...]]]:
    """Figures without those that another table repeats, each with the tables that have it."""
    found: dict[tuple[object, ...], list[Figure]] = {}
    for figure in figures:
        key = (figure.value, figure.resolution, figure.tokens, figure.trained)
        found.setdefault(key, []).append(figure)
    return [(same[0], tuple(figure.table for figure in same)) for same in found.values()]


def settings_that_matter(result: Result) -> dict[str, Any]:
    """What two results should share where their scores are to be compared, under the names that notes give it."""
    settings = {name: result.settings.get(key) for key, name in SETTINGS.items()}
    judge = result.content.get("judge") or {}
    return settings | {"limit": result.content.get("limit"), "judge": judge.get("model")}


Notes = dict[str, list[str]]
"""Sentences by what they are about: a task, or a run and a task (`run/task`)."""


def differing_settings(runs: Sequence[Run]) -> Notes:
    """For each task that several runs have, a sentence for each setting that they do not share."""
    notes: Notes = {}
    for task in tasks_of(runs):
        settings = {run.name: settings_that_matter(run.results[task]) for run in runs if task in run.results}
        for name in next(iter(settings.values())):
            holders: dict[str, list[str]] = {}
            for run, values in settings.items():
                holders.setdefault(json.dumps(values[name]), []).append(run)
            if len(holders) > 1:
                parts = "; ".join(f"{_short(value)} ({', '.join(names)})" for value, names in holders.items())
                notes.setdefault(task, []).append(f"the runs differ in {name}: {parts}")
    return notes


def _short(value: str) -> str:
    return value if len(value) <= 24 else f'{value[:10]}..."'


def caveats(runs: Sequence[Run]) -> Notes:
    """In what each result differs from how the papers measured, as far as it tells."""
    notes: Notes = {}
    for run in runs:
        for task, result in run.results.items():
            settings, judge = result.settings, (result.content.get("judge") or {}).get("model")
            said = {
                f"only {result.questions} questions were asked": result.content.get("limit") is not None,
                "the images were left out": settings.get("no_images"),
                "answers were sampled, the papers' are greedy": settings.get("temperature"),
                "answers are from a beam search, the papers' are greedy": (settings.get("num_beams") or 1) > 1,
                f"the judge was {judge}": judge,
            }
            sentences = [text for text, holds in said.items() if holds]
            if sentences:
                notes[f"{run.name}/{task}"] = sentences
    return notes


def joined(notes: Notes) -> list[str]:
    """Each sentence once, after all that it is about."""
    about: dict[str, list[str]] = {}
    for subject, sentences in notes.items():
        for sentence in sentences:
            about.setdefault(sentence, []).append(subject)
    return [f"{', '.join(subjects)}: {sentence}" for sentence, subjects in about.items()]


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Tasks that any of the runs has."""
    return list(dict.fromkeys(task for run in runs for task in run.results))


def common_tasks(runs: Sequence[Run]) -> list[str]:
    """Tasks for which every run has a score."""
    return [task for task in tasks_of(runs) if all(score(run, task) is not None for run in runs)]


def score(run: Run, task: str) -> float | None:
    """A run's main metric on a task; None where it has none."""
    result = run.results.get(task)
    return None if result is None else result.metric(result.main)


def mean_score(run: Run, tasks: Sequence[str]) -> float:
    """Mean of a run's main metrics, each as a percentage of the best possible score."""
    return fmean(in_percent(run.results[task].benchmark or "", score(run, task) or 0.0) for task in tasks)


def relative_score(run: Run, baseline: Run | None, tasks: Sequence[str]) -> float | None:
    """Mean over tasks of a run's score in percent of the baseline's; None without a baseline that has them all."""
    ratios = []
    for task in tasks:
        own, full = score(run, task), score(baseline, task) if baseline else None
        if own is None or not full:
            return None
        ratios.append(100 * own / full)
    return fmean(ratios) if ratios else None


def baselines(runs: Sequence[Run], chosen: str | None = None) -> Mapping[str, Run]:
    """For each run, by name, the run that its relative performance refers to, where there is one.

    Args:
        runs: all of the report.
        chosen: name or folder of the baseline for all runs; None: for each run, the only one of the same model
            without reduction.

    Raises:
        ValueError: `chosen` is none of the runs; they are listed.
    """
    if chosen is not None:
        named = [run for run in runs if chosen.rstrip("/") in (run.name, str(run.folder))]
        if not named:
            raise ValueError(f"--baseline {chosen}: no such run here; the runs are: {', '.join(r.name for r in runs)}")
        return {run.name: named[0] for run in runs}
    found = {}
    for run in runs:
        full = [other for other in runs if (other.method, other.model) == (UNREDUCED, run.model)]
        if len(full) == 1:
            found[run.name] = full[0]
    return found
