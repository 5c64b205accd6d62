"""SEED-Bench: questions with four options about pictures, and about videos of which a frame is shown.

Paper: https://arxiv.org/abs/2307.16125
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_json, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS, ANSWERS = "llava-seed-bench.jsonl", "SEED-Bench.json"
KINDS = ("image", "video")


@dataclass(frozen=True, kw_only=True)
class Seed(Task):
    """Main metric: accuracy on the questions about pictures. An answer that is more than the letter is wrong.

    Attributes:
        kinds: of questions that are asked.
    """

    kinds: tuple[str, ...] = KINDS

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's file asks the questions; the right answers are in SEED-Bench's own file."""
        truths = _read_truths(folder / ANSWERS)
        questions = []
        for question in read_questions(folder / QUESTIONS):
            if str(question.question_id) not in truths:
                raise ValueError(
                    f"{folder / QUESTIONS}: question {question.question_id!r} is not in {folder / ANSWERS}; use files "
                    "of one release"
                )
            known = question.with_facts(**truths[str(question.question_id)])
            questions.append(known.in_image_group())
        return [question for question in questions if question.facts["kind"] in self.kinds]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, with the question's kind and type."""
        right = answer == question.facts["answer"]
        return {"score": float(right), "kind": question.facts["kind"], "type": question.facts["type"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`accuracy` on all, by kind, and by type of question."""
        return {**super().summarize(grades), **accuracy_by(grades, "kind"), **accuracy_by(grades, "type")}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """Lines of `question_id` and `prediction`."""
        file = folder / f"{self.name}.jsonl"
        rows = [
            json.dumps({"question_id": question.facts["id"], "prediction": answer}) + "\n"
            for question, answer in zip(questions, answers, strict=True)
        ]
        file.write_text("".join(rows), encoding="utf-8")
        return [file]


def _read_truths(file: Path) -> dict[str, dict[str, Any]]:
    """Id, right answer, kind and type of SEED-Bench's questions by id."""
    content = read_json(file, dict, "SEED-Bench's questions and their types")
    try:
        types = {number: name for name, number in content["question_type"].items()}
        return {
            str(row["question_id"]): {
                "id": row["question_id"],
                "answer": row["answer"],
                "kind": row["data_type"],
                "type": types[row["question_type_id"]],
            }
            for row in content["questions"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected 'question_type' and 'questions', each with question_id, answer, data_type and "
            f"question_type_id ({error!r})"
        ) from error


_INSTRUCTIONS = "https://github.com/AILab-CVC/SEED-Bench, DATASET.md"
_FILES = (
    Needed(QUESTIONS, "LLaVA's eval.zip"),
    Needed(ANSWERS, "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"),
    Needed("SEED-Bench-image", _INSTRUCTIONS),
)
_FRAMES = Needed("SEED-Bench-video-image", f"{_INSTRUCTIONS}; the middle frames, by LLaVA's extract_video_frames.py")
TASKS = (
    Seed(
        name="seed",
        title="SEED-Bench",
        folder="seed_bench",
        needs=(*_FILES, _FRAMES),
        main="accuracy_image",
        published={"SEED-IMG": "accuracy_image", "SEED": "accuracy"},
    ),
    Seed(
        name="seed_img",
        title="SEED-Bench, pictures",
        folder="seed_bench",
        needs=_FILES,
        main="accuracy_image",
        published={"SEED-IMG": "accuracy_image"},
        kinds=("image",),
    ),
)
