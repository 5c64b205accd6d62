"""MM-Vet: open questions that need several abilities at once; a judge gives each answer 0 to 1.

Paper: https://arxiv.org/abs/2308.02490
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.questions import Question, read_json, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS, METADATA, EVALUATOR = "llava-mm-vet.jsonl", "mm-vet.json", "mm-vet_evaluator.py"
TURNS = 6  # as often the official program asks a judge that gives no number, each time at a higher temperature
REMINDER = "\nPredict the correctness of the answer (digit): "


@dataclass(frozen=True, kw_only=True)
class MmVet(Task):
    """Main metric: the mean of the judge's scores, in percent. The judge's prompt is the official program's own."""

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's questions with the right answers and abilities of the official file."""
        known = read_json(folder / METADATA, dict, "MM-Vet's questions, an object of v1_0, v1_1, ...")
        prompt = read_prompt(folder / EVALUATOR)
        questions = []
        for question in read_questions(folder / QUESTIONS):
            row = known.get(_key(question))
            if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or "capability" not in row:
                raise ValueError(f"{folder / METADATA}: no {_key(question)} with question, answer and capability")
            facts = {"truth": row["answer"], "abilities": list(row["capability"]), "prompt": prompt}
            questions.append(question.with_facts(**facts, asked=row.get("question", question.text)))
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, 0 where the judge gives no number in six attempts, with the question's `abilities`."""
        assert judge is not None
        facts = question.facts
        truth = facts["truth"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = f"{facts['prompt']}\n{' | '.join([facts['asked'], truth, answer, ''])}"
        score = None
        for turn in range(TURNS):
            text = prompt + REMINDER if turn else prompt
            verdict = judge.ask(text, temperature=0.5 * max(turn - 1, 0), max_tokens=3, turn=turn)
            score = parse_score(verdict.text)
            if score is not None:
                break
        return {
            "score": score or 0.0,
            "unjudged": score is None,
            "abilities": facts["abilities"],
            "judge": verdict.model,
        }

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`score` over all, and over the questions that need each ability; `unjudged`: how many have no verdict."""
        abilities = sorted({name for grade in grades for name in grade["abilities"]})
        parts = {
            f"score_{name}": percent(grade["score"] for grade in grades if name in grade["abilities"])
            for name in abilities
        }
        unjudged = float(sum(grade.get("unjudged", False) for grade in grades))
        return {"score": percent(grade["score"] for grade in grades), **parts, "unjudged": unjudged}

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """The answers as the official program reads them: {"v1_0": answer, ...}."""
        file = folder / "mm-vet.json"
        rows = {_key(question): answer for question, answer in zip(questions, answers, strict=True)}
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        return [file]


def parse_score(verdict: str) -> float | None:
    """The number from 0 to 1 that a verdict begins with; None where there is none."""
    try:
        score = float(verdict.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def read_prompt(file: Path) -> str:
    """The text called `prompt` in the official program, which is read and not run.

    Raises:
        ValueError: there is none.
    """
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected MM-Vet's program in Python ({error})") from error
    for node in body:
        named = isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "prompt" for t in node.targets)
        if named and isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    raise ValueError(f"{file}: expected MM-Vet's program, in which a text called prompt stands; there is none")


def _key(question: Question) -> str:
    name = str(question.question_id)
    return name if name.startswith("v1_") else f"v1_{name}"


TASKS = (
    MmVet(
        name="mmvet",
        title="MM-Vet",
        folder="mm-vet",
        needs=(
            Needed(QUESTIONS, "LLaVA's eval.zip"),
            Needed(METADATA, "mm-vet.zip of https://github.com/yuweihao/MM-Vet/releases"),
            Needed("images", "mm-vet.zip of https://github.com/yuweihao/MM-Vet/releases"),
            Needed(EVALUATOR, "https://github.com/yuweihao/MM-Vet"),
        ),
        main="score",
        published={"MM-Vet": "score"},
        images="images",
        max_new_tokens=1024,
        judged=True,
    ),
)
