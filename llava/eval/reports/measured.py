"""What `llava eval` wrote: a run is a folder with a folder for each task, of `result.json` and `grades.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.reports.intervals import Interval, bootstrap, wilson
from llava.eval.reports.published import METHOD_NAMES, UNREDUCED
from llava.eval.results import GRADES_FILE, RESULT_FILE, read_grades, read_result
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import Grade


@dataclass(frozen=True)
class Result:
    """A task's result file, with the grades beside it.

    Attributes:
        folder: of both files.
        content: of the result file.
    """

    folder: Path
    content: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.content["task"])

    @property
    def main(self) -> str | None:
        """The metric that stands for the task; None where a server scores it."""
        return self.content.get("main")

    @property
    def questions(self) -> int:
        """How many were asked."""
        return int(self.content["questions"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """How the questions were asked and answered."""
        return self.content["settings"]

    @property
    def published(self) -> dict[str, str]:
        """Metric by the papers' name of the benchmark."""
        return dict(self.content["published"])

    @property
    def benchmark(self) -> str | None:
        """The papers' name of the benchmark whose figure the main metric is; None: no table of the papers has it."""
        return next((name for name, metric in self.published.items() if metric == self.main), None)

    def metric(self, name: str | None) -> float | None:
        """A metric's value; None where it is missing or not a number."""
        value = self.content["metrics"].get(name)
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def tokens(self) -> float | None:
        """Visual tokens of an image on average."""
        return (self.content.get("visual_tokens") or {}).get("mean")

    @property
    def tokens_before(self) -> float | None:
        """The same without the reduction."""
        return (self.content.get("visual_tokens") or {}).get("before_mean")

    @property
    def flops(self) -> float | None:
        """Of a question on average."""
        return self.content.get("flops_per_question")

    @cached_property
    def _graded(self) -> tuple[list[Grade], list[Any]]:
        rows = read_grades(self.folder)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("grade"), dict):
                file = self.folder / GRADES_FILE
                raise ValueError(f"{file}, question {number}: 'grade' should be an object; evaluate the task again")
        return [row["grade"] for row in rows], [row.get("group") for row in rows]

    @cached_property
    def _bootstrap(self) -> dict[str, Interval]:
        if self.task not in TASKS:
            return {}
        try:
            return bootstrap(*self._graded, TASKS[self.task].summarize)
        except (KeyError, TypeError) as error:
            file = self.folder / GRADES_FILE
            raise ValueError(f"{file} is not what task {self.task} reads ({error}); evaluate the task again") from error

    def interval(self, metric: str) -> Interval | None:
        """Of a metric: Wilson's for an accuracy of independent questions, otherwise by bootstrap; None without grades.

        Raises:
            ValueError: the grades' file is damaged; it is named with the line.
        """
        grades, groups = self._graded
        value = self.metric(metric)
        if value is None or not grades:
            return None
        if _is_accuracy(grades, groups, value):
            return wilson(sum(bool(grade["score"]) for grade in grades), len(grades))
        return self._bootstrap.get(metric)


def _is_accuracy(grades: Sequence[Grade], groups: Sequence[Any], value: float) -> bool:
    """Whether a metric is the share of independent questions whose score is 1, all others' being 0."""
    if any(group is not None for group in groups) or any(grade.get("score") not in (0, 1) for grade in grades):
        return False
    return math.isclose(100 * fmean(grade["score"] for grade in grades), value, abs_tol=1e-6)


@dataclass(frozen=True)
class Run:
    """Results of one checkpoint with one way of reducing tokens.

    Attributes:
        name: that tables call it.
        folder: of the run.
        results: by task.
    """

    name: str
    folder: Path
    results: Mapping[str, Result] = field(repr=False)

    @property
    def model(self) -> str | None:
        """The papers' name of the model, where the results know it."""
        return next(iter(self.results.values())).content["checkpoint"].get("model")

    @property
    def method(self) -> str:
        """The token reduction, as the papers name it; several are joined by a plus."""
        reduction = next(iter(self.results.values())).content.get("reduction") or {}
        names = [str(site["name"]) for site in reduction.values() if site]
        return " + ".join(METHOD_NAMES.get(name, name) for name in names) or UNREDUCED


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders; the name is the folder's, or the whole path where two folders share it.

    Raises:
        ValueError: a folder holds no result or is named twice, a file is damaged or of another format, or the results
            of a folder are of several methods or checkpoints.
    """
    names = [folder.resolve().name for folder in folders]
    repeated = {str(folder) for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1}
    if repeated:
        raise ValueError(f"run {sorted(repeated)[0]} is named twice")
    unique = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [_load_run(name, folder) for name, folder in zip(unique, folders, strict=True)]


def _load_run(name: str, folder: Path) -> Run:
    files = sorted(folder.glob(f"*/{RESULT_FILE}"))
    if not files:
        inside = "; name the folder above it" if (folder / RESULT_FILE).is_file() else ""
        raise ValueError(f"{folder} holds no result of `llava eval` (TASK/{RESULT_FILE}){inside}")
    results = [Result(file.parent, read_result(file.parent)) for file in files]
    for what, of in {"reduction": _reduction, "checkpoint": _checkpoint}.items():
        if any(of(result) != of(results[0]) for result in results):
            raise ValueError(f"{folder}: the tasks' results differ in their {what}; give each a folder of its own")
    return Run(name, folder, {result.task: result for result in results})


def _reduction(result: Result) -> object:
    return result.content.get("reduction") or {}


def _checkpoint(result: Result) -> object:
    return [result.content["checkpoint"].get(key) for key in ("model", "sha256")]
