"""What a benchmark is: how its questions are read, how they are asked, and how an answer is graded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question

if TYPE_CHECKING:
    from llava.eval.judge import Judge

Grade = dict[str, Any]
"""What one answer is worth: values of JSON, from which `Task.summarize` makes the metrics."""


@dataclass(frozen=True)
class Needed:
    """A file or folder that a task reads.

    Attributes:
        path: where it goes, within the task's folder.
        source: what to download, and from where.
    """

    path: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A benchmark, on LLaVA's layout of its files.

    Attributes:
        name: what `--task` calls it.
        title: what tables call it.
        folder: of its files, in the data folder (`playground/data/eval`).
        needs: files that must be there.
        main: the metric that stands for the task; None where only a server scores, so that there is none here.
        published: for benchmarks of the papers' tables, under their names in `llava.eval.reports`, which metric is
            that figure.
        images: folder of the pictures and clips, within `folder`.
        templates: the prompt template by the one that is usual for the checkpoint, where its program has another.
        max_new_tokens: longest answer in tokens.
        judged: whether a model grades the answers: `grade` gets a judge.
    """

    name: str
    title: str
    folder: str
    needs: tuple[Needed, ...]
    main: str | None
    published: Mapping[str, str] = field(default_factory=dict)
    images: str = "."
    templates: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 128
    judged: bool = False

    @abstractmethod
    def read(self, folder: Path) -> list[Question]:
        """The questions, as they are asked: `text` is the whole question with what it says about the form of answer.

        Args:
            folder: of the task's files; those of `needs` are there.

        Raises:
            ValueError: a file is not what it should be; it is named, with line or entry.
        """

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """What an answer is worth.

        Args:
            question: as read, with `facts` for the grading.
            answer: the model's, stripped.
            judge: for tasks that are `judged`; never None for them.
        """
        raise NotImplementedError(f"{self.name} is scored by its server")

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """The metrics by name; by default the mean of the grades' `score`, in percent, as `accuracy`.

        Must not depend on the order of the grades, nor keep anything: intervals call it on resampled grades.
        """
        return {"accuracy": percent(grade["score"] for grade in grades)}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """Write the answers in the form that the benchmark's server or official program reads; none by default.

        Args:
            questions, answers: all of the task, in order.
            folder: where the files go.

        Returns:
            The files.
        """
        return []

    def check_files(self, data: Path) -> None:
        """Raise a ValueError that names every file that is missing, its place and where it comes from."""
        missing = [need for need in self.needs if not (data / self.folder / need.path).exists()]
        if missing:
            lines = [f"  {data / self.folder / need.path}  ({need.source})" for need in missing]
            raise ValueError("\n".join([f"task {self.name}: files are missing, see docs/evaluation.md:", *lines]))

    def questions(self, data: Path) -> list[Question]:
        """`read`, after a look for the files.

        Raises:
            ValueError: a file is missing or not what it should be, or there is no question.
        """
        self.check_files(data)
        found = self.read(data / self.folder)
        if not found:
            raise ValueError(f"task {self.name}: {data / self.folder} holds no question")
        return found


def percent(values: Iterable[float]) -> float:
    """Mean of values from 0 to 1, times 100; of none it is not a number."""
    known = list(values)
    return 100 * fmean(known) if known else float("nan")


def grouped(grades: Iterable[Grade], key: str) -> dict[str, list[Grade]]:
    """Grades by what they have under a key, in order of the groups' names."""
    groups: dict[str, list[Grade]] = {}
    for grade in grades:
        groups.setdefault(str(grade[key]), []).append(grade)
    return dict(sorted(groups.items()))


def accuracy_by(grades: Sequence[Grade], key: str) -> dict[str, float]:
    """Mean of the grades' `score`, in percent, for each value that they have under a key, as `accuracy_VALUE`."""
    parts = grouped(grades, key)
    return {f"accuracy_{name}": percent(grade["score"] for grade in part) for name, part in parts.items()}
