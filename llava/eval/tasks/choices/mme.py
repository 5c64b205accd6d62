"""MME: yes or no, in pairs of questions about one picture, over ten tasks of perception and four of cognition.

Paper: https://arxiv.org/abs/2306.13394
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import SHORT_ANSWER
from llava.eval.questions import Question, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, accuracy_by, grouped, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
_YES_NO = "Please answer yes or no."


def said(answer: str) -> str:
    """How MME reads an answer: yes or no, if it is in the first four characters; otherwise `other`."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


@dataclass(frozen=True, kw_only=True)
class Mme(Task):
    """Main metric: the sum over perception's ten tasks of accuracy and of accuracy over pairs, at most 2000.

    `cognition` is the same sum of its four tasks, at most 800, and `total` both.
    """

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's file asks MME's questions; the right answers are in MME's own files, one for each picture."""
        file = folder / QUESTIONS
        questions = [_with_truth(question, folder / RELEASE, file) for question in read_questions(file)]
        for name, count in Counter(question.group for question in questions).items():
            if count != 2:
                raise ValueError(f"{file}: {count} questions about picture {name!r}; MME has two about each")
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, with the question's category and picture."""
        right = said(answer) == question.facts["true"]
        return {"score": float(right), "category": question.facts["category"], "picture": question.group}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`perception`, `cognition`, `total`, and accuracy of questions and of pairs by category."""
        parts = grouped(grades, "category")
        single = accuracy_by(grades, "category")
        pairs = {f"accuracy_plus_{name}": percent(_both_right(part)) for name, part in parts.items()}
        scores = {name: single[f"accuracy_{name}"] + pairs[f"accuracy_plus_{name}"] for name in parts}
        sums = [sum(scores.get(name, 0.0) for name in names) for names in (PERCEPTION, COGNITION)]
        return {"perception": sums[0], "cognition": sums[1], "total": sum(sums), **single, **pairs}


def _both_right(grades: Iterable[Grade]) -> list[float]:
    """For each question whether all about its picture are right: a pair then counts as often as it was drawn."""
    return [
        min(grade["score"] for grade in pair) for pair in grouped(grades, "picture").values() for _ in range(len(pair))
    ]


def _with_truth(question: Question, release: Path, file: Path) -> Question:
    category, *_, picture = str(question.question_id).split("/")
    text = _spaced(question.text.replace(SHORT_ANSWER, ""))
    text = text if _YES_NO in text else f"{text} {_YES_NO}"
    if category not in PERCEPTION + COGNITION:
        raise ValueError(f"{file}: question {question.question_id!r} is of no category of MME")
    truth = _read_truths(release / category, f"{picture.split('.')[0]}.txt").get(text)
    if truth is None:
        raise ValueError(
            f"{file}: question {question.question_id!r}, {text!r:.200}, is not in MME's own files in "
            f"{release / category}; use files of one release"
        )
    named = question.with_facts(true=truth, category=category)
    return replace(named, group=f"{category}/{picture}")


def _read_truths(folder: Path, name: str) -> dict[str, str]:
    """Answers by question, of the file of one picture; empty where there is none."""
    inner = folder / "questions_answers_YN"
    file = (inner if inner.is_dir() else folder) / name
    lines = file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else []
    rows = [line.strip().partition("\t") for line in lines if line.strip()]
    truths = {_spaced(text): answer.strip().lower() for text, _, answer in rows}
    if not set(truths.values()) <= {"yes", "no"}:
        raise ValueError(f"{file}: expected lines of a question, a tab, and Yes or No")
    return truths


def _spaced(text: str) -> str:
    """Single spaces: LLaVA's and MME's files differ in them."""
    return " ".join(text.split())


_MME = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation: by request"
TASKS = (
    Mme(
        name="mme",
        title="MME",
        folder="MME",
        needs=(Needed(QUESTIONS, "LLaVA's eval.zip"), Needed(RELEASE, _MME)),
        main="perception",
        published={"MME": "perception", "MME-cognition": "cognition", "MME-sum": "total"},
        images=RELEASE,
    ),
)
