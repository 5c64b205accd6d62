"""VizWiz: what blind people asked about their photos; many can't be answered, and the model is told to say so.

Paper: https://arxiv.org/abs/1802.08218. The papers' figure is that of test-dev, which only its server gives
(https://eval.ai/web/challenges/challenge-page/1911). `vizwiz_val` is scored here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.questions import Question, read_questions
from llava.eval.scoring.vqa import agreement, normalize
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by
from llava.eval.tasks.short_answer.official import (
    LLAVA_FILES,
    read_rows,
    short_question,
    texts_of,
    write_json,
)

if TYPE_CHECKING:
    from llava.eval.judge import Judge

TEST = "llava_test.jsonl"
VAL = "val.json"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(frozen=True, kw_only=True)
class VizWizTest(Task):
    """Scored by its server."""

    def read(self, folder: Path) -> list[Question]:
        """Of LLaVA's file."""
        questions = read_questions(folder / TEST)
        if bare := next((question for question in questions if not question.images), None):
            raise ValueError(f"{folder / TEST}: question {bare.question_id!r} has no image, which is its id")
        return questions

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """A list of {image, answer}, as LLaVA's conversion writes it."""
        pairs = zip(questions, answers, strict=True)
        return write_json(folder / "vizwiz.json", ({"image": q.images[0], "answer": normalize(a)} for q, a in pairs))


@dataclass(frozen=True, kw_only=True)
class VizWizVal(Task):
    """VQA accuracy, in total and by type of answer; asked as LLaVA asks the test set, scored as lmms-eval does."""

    def read(self, folder: Path) -> list[Question]:
        """Of the official file, whose questions have no ids but their images'."""
        file = folder / VAL
        rows = read_rows(file, image=str, question=str, answers=list, answer_type=str)
        return [
            short_question(
                Path(row["image"]).stem,
                row["question"],
                row["image"],
                UNANSWERABLE,
                answers=texts_of(row["answers"], f"{file}, {row['image']}"),
                type=row["answer_type"],
            )
            for row in rows
        ]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: VQA accuracy, 0 to 1; `type`: of the answer."""
        right = [normalize(text) for text in question.facts["answers"]]
        return {"score": agreement(normalize(answer), right), "type": question.facts["type"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Mean accuracy, and that of each type of answer."""
        return super().summarize(grades) | accuracy_by(grades, "type")


_VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
TASKS = (
    VizWizTest(
        name="vizwiz",
        title="VizWiz",
        folder="vizwiz",
        needs=(Needed(TEST, LLAVA_FILES), Needed("test", f"{_VIZWIZ}, test.zip")),
        main=None,
        images="test",
    ),
    VizWizVal(
        name="vizwiz_val",
        title="VizWiz (val)",
        folder="vizwiz",
        needs=(Needed(VAL, f"{_VIZWIZ}, Annotations.zip"), Needed("val", f"{_VIZWIZ}, val.zip")),
        main="accuracy",
        images="val",
    ),
)
