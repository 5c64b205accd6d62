"""The toy world of the quickstart: held-out questions about coloured shapes, two a picture.

Its data lies in `playground/data/toy`: `llava eval CHECKPOINT --task toy --data playground/data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.accuracy import UNSORTED, normalize
from llava.eval.questions import Question, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS = "heldout.jsonl"


@dataclass(frozen=True, kw_only=True)
class Toy(Task):
    """Exact match, as `llava.eval.accuracy` has it; also by type of question."""

    def read(self, folder: Path) -> list[Question]:
        """The held-out questions, which have a right answer and a category."""
        questions = read_questions(folder / QUESTIONS)
        for question in questions:
            if question.answer is None:
                raise ValueError(f"{folder / QUESTIONS}: question_id {question.question_id!r} has no 'answer'")
        return [
            question.with_facts(right=question.answer, category=question.category or UNSORTED).in_image_group()
            for question in questions
        ]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score` 1 or 0, and the question's category."""
        right = normalize(answer) == normalize(question.facts["right"])
        return {"score": int(right), "category": question.facts["category"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Accuracy, and that of each category."""
        return {**super().summarize(grades), **accuracy_by(grades, "category")}


_SOURCE = "python playground/toy/generate.py; --data is the folder above"
TASKS = (
    Toy(
        name="toy",
        title="Toy world",
        folder="toy",
        needs=(Needed(QUESTIONS, _SOURCE), Needed("images", _SOURCE)),
        main="accuracy",
        images="images",
        max_new_tokens=12,
    ),
)
