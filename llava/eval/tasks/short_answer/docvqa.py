"""DocVQA: questions about scanned pages. The validation set is scored here, the test set by its server.

Paper: https://arxiv.org/abs/2007.00398. LLaVA's release has no files of it, so the official ones are read; asked as
LLaVA asks for short answers, as lmms-eval and VLMEvalKit also do (lmms-eval with 32 new tokens at most). PyramidDrop's
paper does not say which set and prompt its figures are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question
from llava.eval.scoring.anls import anls
from llava.eval.tasks.base import Grade, Needed, Task, percent
from llava.eval.tasks.short_answer.official import checked, read_rows, short_question, write_json

if TYPE_CHECKING:
    from llava.eval.judge import Judge

CHALLENGE = "https://rrc.cvc.uab.es/?ch=17&com=downloads"  # an account is needed, which is free


@dataclass(frozen=True, kw_only=True)
class Documents(Task):
    """A set of the challenge's questions.

    Attributes:
        file: the official questions.
        image_key: under which they name their images, whose folders are dropped.
    """

    file: str
    image_key: str = "image"

    def read(self, folder: Path) -> list[Question]:
        """Of the official file."""
        rows = read_rows(folder / self.file, "data", questionId=int, question=str, **{self.image_key: str})
        return [self.question(row, folder / self.file) for row in rows]

    def question(self, row: dict[str, Any], file: Path) -> Question:
        """The question of an entry of the file."""
        return short_question(row["questionId"], row["question"], Path(row[self.image_key]).name)


@dataclass(frozen=True, kw_only=True)
class AnsweredDocuments(Documents):
    """A set with answers. Main metric: ANLS, the mean similarity to the nearest right answer."""

    def question(self, row: dict[str, Any], file: Path) -> Question:
        """The question of an entry, with its right answers."""
        checked(row, f"{file}, question {row['questionId']}", answers=list)
        return super().question(row, file).with_facts(answers=[str(text) for text in row["answers"]])

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: ANLS, 0 to 1."""
        return {"score": anls(answer, question.facts["answers"])}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """ANLS in percent."""
        return {"anls": percent(grade["score"] for grade in grades)}


@dataclass(frozen=True, kw_only=True)
class SubmittedDocuments(Documents):
    """A set whose answers only the server has."""

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """A list of {questionId, answer}."""
        pairs = zip(questions, answers, strict=True)
        return write_json(folder / f"{self.name}.json", ({"questionId": q.question_id, "answer": a} for q, a in pairs))


def _needs(file: str) -> tuple[Needed, ...]:
    return (
        Needed(file, f"{CHALLENGE}, DocVQA task 1 (single page), annotations"),
        Needed("spdocvqa_images", f"{CHALLENGE}, DocVQA task 1 (single page), images"),
    )


_VAL, _TEST = "val_v1.0_withQT.json", "test_v1.0.json"
TASKS = (
    AnsweredDocuments(
        name="docvqa",
        title="DocVQA (val)",
        folder="docvqa",
        needs=_needs(_VAL),
        main="anls",
        published={"DocVQA": "anls"},
        images="spdocvqa_images",
        file=_VAL,
    ),
    SubmittedDocuments(
        name="docvqa_test",
        title="DocVQA (test)",
        folder="docvqa",
        needs=_needs(_TEST),
        main=None,
        images="spdocvqa_images",
        file=_TEST,
    ),
)
