"""GQA: questions made from scene graphs, on objects, attributes and relations; the balanced questions of test-dev.

Paper: https://arxiv.org/abs/1902.09506
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_json, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by
from llava.eval.tasks.short_answer.official import (
    LLAVA_FILES,
    checked,
    write_json,
)

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "data/testdev_balanced_questions.json"


def prediction(answer: str) -> str:
    """An answer as LLaVA hands it to GQA's program: in lower case, without periods at its end."""
    return answer.rstrip(".").lower()


@dataclass(frozen=True, kw_only=True)
class Gqa(Task):
    """As GQA's eval.py: the answer is the right one, letter by letter, or it is wrong."""

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's questions, with the right answers of GQA's file."""
        file = folder / ANNOTATIONS
        annotations = read_json(file, dict)
        return [
            question.with_facts(**_facts(annotations.get(str(question.question_id)), question, file)).in_image_group()
            for question in read_questions(folder / QUESTIONS)
        ]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, 0 or 1; `structural` and `semantic`: the question's types."""
        facts = question.facts
        right = prediction(answer) == facts["answer"]
        return {"score": float(right), "structural": facts["structural"], "semantic": facts["semantic"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Accuracy of all, of `open` and `binary` questions, and of each structural and semantic type."""
        labelled = [{**grade, "kind": "open" if grade["structural"] == "query" else "binary"} for grade in grades]
        parts = (accuracy_by(labelled, key) for key in ("kind", "structural", "semantic"))
        return super().summarize(grades) | {name: value for part in parts for name, value in part.items()}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """What GQA's eval.py reads."""
        pairs = zip(questions, answers, strict=True)
        rows = ({"questionId": q.question_id, "prediction": prediction(answer)} for q, answer in pairs)
        return write_json(folder / "testdev_balanced_predictions.json", rows)


def _facts(row: Any, question: Question, file: Path) -> dict[str, Any]:
    where = f"{file}, question {question.question_id}"
    if row is None:
        raise ValueError(f"{where}: is not there, but {QUESTIONS} asks it; use files of one release")
    types = checked(checked(row, where, answer=str, types=dict)["types"], where, structural=str, semantic=str)
    return {"answer": row["answer"], "structural": types["structural"], "semantic": types["semantic"]}


_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
TASKS = (
    Gqa(
        name="gqa",
        title="GQA",
        folder="gqa",
        needs=(
            Needed(QUESTIONS, LLAVA_FILES),
            Needed(ANNOTATIONS, f"{_GQA}, questions"),
            Needed("data/images", f"{_GQA}, images"),
        ),
        main="accuracy",
        published={"GQA": "accuracy"},
        images="data/images",
    ),
)
