"""ScienceQA: questions of school books with options, half of them with a picture.

Paper: https://arxiv.org/abs/2209.09513
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.questions import LETTER_ONLY, Question, read_json, read_json_list
from llava.eval.scoring.choices import LETTERS, stated_letter
from llava.eval.tasks.base import Grade, Needed, Task, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS, PROBLEMS, SPLITS = "llava_test_CQM-A.json", "problems.json", "pid_splits.json"
SPLIT = "test"


def read_science_questions(path: str | Path, letter_only: bool = False) -> list[Question]:
    """Questions of a JSON list of {"id", "image" (optional), "conversations": [{"value": the question}, ...]}.

    Args:
        path: the file.
        letter_only: ask for the option's letter.

    Raises:
        ValueError: the file is missing or no such list; the entry is named.
    """
    rows = read_json_list(path, "a JSON list of conversations, as LLaVA has ScienceQA")
    return [_question(row, where, letter_only) for where, row in rows]


def _question(row: dict[str, Any], where: str, letter_only: bool) -> Question:
    try:
        name, value, image = row["id"], row["conversations"][0]["value"], row.get("image")
        text = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected id, conversations and the question's value in them ({error!r})") from error
    text += f"\n{LETTER_ONLY['en']}" if letter_only else ""
    prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if image else text
    return Question(name, text, (image,) if image else (), row={"prompt": prompt})


@dataclass(frozen=True, kw_only=True)
class ScienceQA(Task):
    """Main metric: accuracy on the questions with a picture; `accuracy` is that on all. No letter found is wrong."""

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's file asks the questions of the test split; the right answers are in ScienceQA's own file."""
        questions = read_science_questions(folder / QUESTIONS, letter_only=True)
        problems = read_json(folder / PROBLEMS, dict, "ScienceQA's problems by id")
        split = read_json(folder / SPLITS, dict, "ScienceQA's ids by split")
        expected = split.get(SPLIT)
        if not isinstance(expected, list) or {question.question_id for question in questions} != set(expected):
            raise ValueError(
                f"{folder / QUESTIONS} asks other questions than those of {SPLIT!r} in {folder / SPLITS}; "
                "use files of one release"
            )
        return [question.with_facts(right=_right_letter(question, problems, folder)) for question in questions]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, and whether there is a picture."""
        return {"score": float(stated_letter(answer) == question.facts["right"]), "pictured": bool(question.images)}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`accuracy_image` and `accuracy`."""
        pictured = percent(grade["score"] for grade in grades if grade["pictured"])
        return {"accuracy_image": pictured, "accuracy": percent(grade["score"] for grade in grades)}


def _right_letter(question: Question, problems: Any, folder: Path) -> str:
    try:
        return dict(enumerate(LETTERS))[problems[question.question_id]["answer"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / PROBLEMS}: problem {question.question_id!r} needs 'answer', a number from 0 to "
            f"{len(LETTERS) - 1}"
        ) from error


_REPOSITORY = "https://github.com/lupantech/ScienceQA, data/scienceqa"
TASKS = (
    ScienceQA(
        name="scienceqa",
        title="ScienceQA",
        folder="scienceqa",
        needs=(
            Needed(QUESTIONS, "LLaVA's eval.zip"),
            Needed(PROBLEMS, _REPOSITORY),
            Needed(SPLITS, _REPOSITORY),
            Needed("images/test", f"{_REPOSITORY}: its download.sh"),
        ),
        main="accuracy_image",
        published={"ScienceQA-IMG": "accuracy_image"},
        images="images/test",
        max_new_tokens=1024,
    ),
)
