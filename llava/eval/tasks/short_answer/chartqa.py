"""ChartQA: questions about charts, half of them written by people, half made from summaries; the test set.

Paper: https://arxiv.org/abs/2203.10244. LLaVA's release has no files of it, so the official ones are read; asked as
LLaVA asks for short answers, as VLMEvalKit does (lmms-eval: "Answer the question with a single word.", 16 new tokens
at most). PyramidDrop's paper does not say which prompt its figures are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.questions import Question
from llava.eval.scoring.relaxed import relaxed_match
from llava.eval.tasks.base import Grade, Needed, Task, grouped, percent
from llava.eval.tasks.short_answer.official import read_rows, short_question

if TYPE_CHECKING:
    from llava.eval.judge import Judge

PARTS = ("human", "augmented")
FILE = "test/test_{}.json"


@dataclass(frozen=True, kw_only=True)
class ChartQa(Task):
    """Relaxed accuracy: `overall` of all questions, and of each part."""

    def read(self, folder: Path) -> list[Question]:
        """Of the official files, whose questions have no ids: part and number."""
        rows = (
            (part, number, row)
            for part in PARTS
            for number, row in enumerate(read_rows(folder / FILE.format(part), imgname=str, query=str, label=str))
        )
        return [
            short_question(f"{part}-{number}", row["query"], row["imgname"], label=row["label"], part=part)
            for part, number, row in rows
        ]

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, 0 or 1, and `part`."""
        return {"score": float(relaxed_match(answer, question.facts["label"])), "part": question.facts["part"]}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """Relaxed accuracy in percent."""
        parts = {"overall": grades, **grouped(grades, "part")}
        return {name: percent(grade["score"] for grade in part) for name, part in parts.items()}


_CHARTQA = "https://github.com/vis-nlp/ChartQA, folder ChartQA Dataset/test"
TASKS = (
    ChartQa(
        name="chartqa",
        title="ChartQA",
        folder="chartqa",
        needs=(*(Needed(FILE.format(part), _CHARTQA) for part in PARTS), Needed("test/png", _CHARTQA)),
        main="overall",
        published={"ChartQA": "overall"},
        images="test/png",
    ),
)
