"""POPE: is this object in the picture? Yes or no, over three ways of choosing the absent objects.

Paper: https://arxiv.org/abs/2305.10355
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_jsonl, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, grouped, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

CATEGORIES = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"
LABELS = "coco/coco_pope_{}.json"


def says_yes(answer: str) -> bool:
    """How POPE reads an answer: its first sentence means no where it has the word no or not, otherwise yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def binary_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent, of grades with `said` and `true`."""
    hits = sum(grade["said"] and grade["true"] for grade in grades)
    said, true = (sum(grade[key] for grade in grades) for key in ("said", "true"))
    return {
        "accuracy": percent(grade["said"] == grade["true"] for grade in grades),
        "precision": 100 * hits / said if said else 0.0,
        "recall": 100 * hits / true if true else 0.0,
        "f1": 200 * hits / (said + true) if said + true else 0.0,
        "yes": percent(grade["said"] for grade in grades),
    }


@dataclass(frozen=True, kw_only=True)
class Pope(Task):
    """Main metric: the mean of the three categories' F1, as LLaVA's table has it."""

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's file asks the questions of all categories; within one they stand in the order of POPE's own file."""
        labels = {name: list(_read_labels(folder / LABELS.format(name))) for name in CATEGORIES}
        waiting = {name: iter(rows) for name, rows in labels.items()}
        questions = []
        for question in read_questions(folder / QUESTIONS):
            row = next(waiting.get(question.category or "", iter(())), None)
            if row is None or row.get("image") not in (None, *question.images):
                raise ValueError(
                    f"{folder / QUESTIONS}: question {question.question_id} of category {question.category!r} is not "
                    f"the next one of that category in {folder / LABELS.format('*')}; use files of one release"
                )
            named = question.with_facts(true=row["label"] == "yes", category=question.category)
            questions.append(named.in_image_group())
        unasked = [name for name, rows in waiting.items() if next(rows, None) is not None]
        if unasked:
            raise ValueError(
                f"{folder / QUESTIONS} asks fewer questions than {folder / LABELS.format(unasked[0])} has; use files "
                "of one release"
            )
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`said` and `true`: whether the answer is yes, and whether it should be."""
        return {"said": says_yes(answer), **question.facts}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Means over the categories, and each category's figures."""
        parts = {name: binary_metrics(part) for name, part in grouped(grades, "category").items()}
        means = {key: fmean(part[key] for part in parts.values()) for key in next(iter(parts.values()))}
        return means | {f"{key}_{name}": value for name, part in parts.items() for key, value in part.items()}


def _read_labels(file: Path) -> Iterator[dict[str, Any]]:
    for number, row in read_jsonl(file):
        if row.get("label") not in ("yes", "no"):
            raise ValueError(f"{file}, line {number}: 'label' is {row.get('label')!r}; expected yes or no")
        yield row


# Later releases have 90 more questions of the random category than LLaVA's file.
_POPE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
TASKS = (
    Pope(
        name="pope",
        title="POPE",
        folder="pope",
        needs=(
            Needed(QUESTIONS, "LLaVA's eval.zip"),
            *(Needed(LABELS.format(name), _POPE) for name in CATEGORIES),
            Needed("val2014", "http://images.cocodataset.org/zips/val2014.zip"),
        ),
        main="f1",
        published={"POPE": "f1", **{f"POPE-{name}": f"f1_{name}" for name in CATEGORIES}},
        images="val2014",
    ),
)
