"""VQAv2: open questions about pictures of COCO, ten annotators each.

Paper: https://arxiv.org/abs/1612.00837. The papers' figure is that of test-dev, which only its server gives
(https://eval.ai/web/challenges/challenge-page/830). `vqav2_val` is scored here, and is no substitute: most of its
pictures are also in COCO's train2017, from which LLaVA's training data comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_jsonl, read_questions
from llava.eval.scoring.vqa import agreement, normalize, official_form
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

TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
VAL_IMAGE = "COCO_val2014_{:012d}.jpg"


@dataclass(frozen=True, kw_only=True)
class VqaV2TestDev(Task):
    """The questions of test-dev; the server wants an answer to all of the test set's, an empty one to the others."""

    def read(self, folder: Path) -> list[Question]:
        """Of LLaVA's file."""
        questions = read_questions(folder / TEST_DEV)
        whole = tuple(row.get("question_id") for _, row in read_jsonl(folder / TEST))
        if strange := {question.question_id for question in questions} - set(whole):
            raise ValueError(f"{folder / TEST}: lacks question {min(strange)} of {TEST_DEV}; use files of one release")
        return [question.with_facts(whole=whole) for question in questions]

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """A list of {question_id, answer} for the whole test set, as LLaVA's conversion writes it."""
        given = {q.question_id: normalize(answer) for q, answer in zip(questions, answers, strict=True)}
        whole = questions[0].facts["whole"]
        return write_json(folder / "vqav2.json", ({"question_id": i, "answer": given.get(i, "")} for i in whole))


@dataclass(frozen=True, kw_only=True)
class VqaV2Val(Task):
    """VQA accuracy of what LLaVA would submit, in total and by type of answer.

    Answers of the model and of the annotators get the official form, in all questions, as in lmms-eval. (The program
    that visualqa.org offers leaves number words and articles of annotators alone, and all that they say where the ten
    agree.)
    """

    def read(self, folder: Path) -> list[Question]:
        """Of the official files."""
        file = folder / VAL_ANNOTATIONS
        rows = read_rows(file, "annotations", question_id=int, answers=list, answer_type=str)
        annotations = {row["question_id"]: row for row in rows}
        asked = read_rows(folder / VAL_QUESTIONS, "questions", question_id=int, image_id=int, question=str)
        missing = next((row["question_id"] for row in asked if row["question_id"] not in annotations), None)
        if missing is not None:
            raise ValueError(f"{file}: no answers to question {missing} of {VAL_QUESTIONS}; use files of one release")
        return [_val_question(row, annotations[row["question_id"]], file) for row in asked]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: VQA accuracy, 0 to 1; `type`: of the answer."""
        right = [official_form(text) for text in question.facts["answers"]]
        return {"score": agreement(official_form(normalize(answer)), right), "type": question.facts["type"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Mean accuracy, and that of each type of answer."""
        return super().summarize(grades) | accuracy_by(grades, "type")


def _val_question(row: dict[str, Any], annotation: dict[str, Any], file: Path) -> Question:
    answers = texts_of(annotation["answers"], f"{file}, question {row['question_id']}")
    image = VAL_IMAGE.format(row["image_id"])
    return short_question(row["question_id"], row["question"], image, answers=answers, type=annotation["answer_type"])


_COCO = "http://images.cocodataset.org/zips"
_VQA = "https://visualqa.org/download.html"
TASKS = (
    VqaV2TestDev(
        name="vqav2",
        title="VQAv2",
        folder="vqav2",
        needs=(
            Needed(TEST_DEV, LLAVA_FILES),
            Needed(TEST, LLAVA_FILES),
            Needed("test2015", f"{_COCO}/test2015.zip"),
        ),
        main=None,
        images="test2015",
    ),
    VqaV2Val(
        name="vqav2_val",
        title="VQAv2 (val)",
        folder="vqav2",
        needs=(
            Needed(VAL_QUESTIONS, f"{_VQA}, validation questions 2017 v2.0"),
            Needed(VAL_ANNOTATIONS, f"{_VQA}, validation annotations 2017 v2.0"),
            Needed("val2014", f"{_COCO}/val2014.zip"),
        ),
        main="accuracy",
        images="val2014",
    ),
)
