"""Q-Bench: questions with options about how good a picture is (its perception part, LLVisionQA).

Paper: https://arxiv.org/abs/2309.14181
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_json_list
from llava.eval.scoring.choices import LETTERS, inferred_letter, list_options
from llava.eval.tasks.base import Grade, Needed, Task

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS = "llvisionqa_dev.json"
# What LLaVA puts between question and options, by language; the backslash is in its prompt too.
INTRODUCTION = {"en": "\nChoose between one of the options as follows:", "zh": "\\在下列选项中选择一个:"}


def read_qbench_questions(path: str | Path, lang: str = "en") -> list[Question]:
    """Questions of a JSON list of {"img_path", "question", "candidates": [...], "correct_ans" (optional)}.

    Args:
        path: the file.
        lang: en or zh, of the line that introduces the options.

    Raises:
        ValueError: the file is missing or no such list; the entry is named.
    """
    rows = read_json_list(path, "Q-Bench's JSON list of questions")
    return [_question(number, row, where, lang) for number, (where, row) in enumerate(rows)]


def _question(number: int, row: dict[str, Any], where: str, lang: str) -> Question:
    texts, options = [row.get("img_path"), row.get("question")], row.get("candidates")
    if not isinstance(options, list) or not options or not all(isinstance(text, str) for text in [*texts, *options]):
        raise ValueError(f"{where}: expected img_path, question and candidates, a list of texts")
    text = "\n".join([f"{row['question']}{INTRODUCTION[lang]}", *list_options(options[:4])])
    return Question(number, text, (row["img_path"],), row=row, answer_key="response")


@dataclass(frozen=True, kw_only=True)
class QBench(Task):
    """Main metric: accuracy, of letters or of options in words. Q-Bench itself lets a model compare them."""

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's questions of the dev set, which has the right answers."""
        questions = read_qbench_questions(folder / QUESTIONS)
        for question in questions:
            if question.row.get("correct_ans") not in question.row["candidates"][:4]:
                raise ValueError(
                    f"{folder / QUESTIONS}, entry {question.question_id}: 'correct_ans' is none of the candidates; "
                    "use the dev set, which has it"
                )
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`."""
        options = dict(zip(LETTERS, question.row["candidates"][:4], strict=False))
        said = options.get(inferred_letter(answer, options) or "")
        return {"score": float(said == question.row["correct_ans"])}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """Lines of the questions' entries, each with the `response`."""
        file = folder / f"{Path(QUESTIONS).stem}_answers.jsonl"
        rows = [
            json.dumps({**question.row, "response": answer}) + "\n"
            for question, answer in zip(questions, answers, strict=True)
        ]
        file.write_text("".join(rows), encoding="utf-8")
        return [file]


_SOURCE = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
TASKS = (
    QBench(
        name="qbench",
        title="Q-Bench",
        folder="qbench",
        needs=(Needed(QUESTIONS, _SOURCE), Needed("images_llviqionqa", f"{_SOURCE}: images_llvisionqa.tar")),
        main="accuracy",
        published={"Q-Bench": "accuracy"},
        images="images_llviqionqa",
        max_new_tokens=1024,
    ),
)
