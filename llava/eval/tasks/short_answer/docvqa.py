"""DocVQA: questions about scanned pages. The validation set is scored here, the test set by its server.

Paper: https://arxiv.org/abs/2007.00398. LLaVA's release has no files of it, so the official ones are read; asked as
LLaVA asks for short answers, as lmms-eval and VLMEvalKit also do (lmms-eval with 32 new tokens at most). PyramidDrop's
paper does not say which set and prompt its figures are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.questions import Question
from llava.eval.scoring.anls import anls
from llava.eval.tasks.base import Grade, Needed, Task, percent
from llava.eval.tasks.short_answer.official import checked, read_rows, short_question, write_json

if TYPE_CHECKING:
    from llava.eval.judge import Judge

CHALLENGE = "https://rrc.cvc.uab.es/?ch=17&com=downloads"  # an account is needed, which is free


@dataclass(frozen=True, kw_only=True)
class DocVqa(Task):
    """ANLS, the mean similarity to the nearest right answer.

    Attributes:
        file: the official questions.
        image_key: under which they name their images, whose folders are dropped.
    """

    file: str
    image_key: str = "image"

    def read(self, folder: Path) -> list[Question]:
        """Of the official file; of the test set without answers."""
        file = folder / self.file
        rows = read_rows(file, "data", questionId=int, question=str, **{self.image_key: str})
        if self.main is None:
            return [self._question(row) for row in rows]
        kinds = {"answers": list}
        rows = [checked(row, f"{file}, question {row['questionId']}", **kinds) for row in rows]
        return [self._question(row).with_facts(answers=[str(text) for text in row["answers"]]) for row in rows]

    def _question(self, row: dict) -> Question:
        return short_question(row["questionId"], row["question"], Path(row[self.image_key]).name)

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: ANLS, 0 to 1."""
        return {"score": anls(answer, question.facts["answers"])}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """ANLS in percent."""
        return {"anls": percent(grade["score"] for grade in grades)}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """For the test set: a list of {questionId, answer}."""
        if self.main is not None:
            return []
        pairs = zip(questions, answers, strict=True)
        return write_json(folder / f"{self.name}.json", ({"questionId": q.question_id, "answer": a} for q, a in pairs))


def _needs(file: str) -> tuple[Needed, ...]:
    return (
        Needed(file, f"{CHALLENGE}, DocVQA task 1 (single page), annotations"),
        Needed("spdocvqa_images", f"{CHALLENGE}, DocVQA task 1 (single page), images"),
    )


_VAL, _TEST = "val_v1.0_withQT.json", "test_v1.0.json"
TASKS = (
    DocVqa(
        name="docvqa",
        title="DocVQA (val)",
        folder="docvqa",
        needs=_needs(_VAL),
        main="anls",
        published={"DocVQA": "anls"},
        images="spdocvqa_images",
        file=_VAL,
    ),
    DocVqa(
        name="docvqa_test",
        title="DocVQA (test)",
        folder="docvqa",
        needs=_needs(_TEST),
        main=None,
        images="spdocvqa_images",
        file=_TEST,
    ),
)
