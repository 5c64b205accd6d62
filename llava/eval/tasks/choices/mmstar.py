"""MMStar: questions with four options that can't be answered without the picture, over six abilities.

Paper: https://arxiv.org/abs/2403.20330
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.records import read_records
from llava.eval.questions import LETTER_ONLY, Question
from llava.eval.scoring.choices import likeliest_letter
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by

if TYPE_CHECKING:
    from llava.eval.judge import Judge

TABLE = "mmstar.parquet"
LETTERS = "ABCD"
# As lmms-eval asks, without the period that LLaVA's own sentence ends with.
ENDING = LETTER_ONLY["en"].removesuffix(".")


@dataclass(frozen=True, kw_only=True)
class MMStar(Task):
    """Main metric: accuracy on all questions. Questions and letters are put and read as by lmms-eval."""

    def read(self, folder: Path) -> list[Question]:
        """A question for each row; its options stand in its text, and its picture in the row."""
        file = folder / TABLE
        return [_question(row, f"{file}, row {number}") for number, row in enumerate(read_records(str(file)))]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, with the question's category."""
        right = likeliest_letter(answer, LETTERS) == question.facts["answer"]
        return {"score": float(right), "category": question.category}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`accuracy`, and that of each category."""
        return {**super().summarize(grades), **accuracy_by(grades, "category")}


def _question(row: Any, where: str) -> Question:
    try:
        image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        text, answer, category = row["question"].strip(), row["answer"].strip().upper(), row["category"]
        known = isinstance(image, bytes) and answer in tuple(LETTERS)
        question = Question(row["index"], f"{text}\n{ENDING}", category=category, pictures=(image,))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected index, question, image, answer and category ({error!r})") from error
    if not known:
        raise ValueError(f"{where}: expected an image's bytes and an answer of A, B, C or D")
    return question.with_facts(answer=answer)


TASKS = (
    MMStar(
        name="mmstar",
        title="MMStar",
        folder="mmstar",
        needs=(Needed(TABLE, "https://huggingface.co/datasets/Lin-Chen/MMStar"),),
        main="accuracy",
        published={"MMStar": "accuracy"},
        max_new_tokens=1024,
    ),
)
