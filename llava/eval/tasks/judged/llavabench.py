"""LLaVA-Bench in the wild: open questions on 24 pictures; a judge compares each answer with GPT-4's.

Paper: https://arxiv.org/abs/2304.08485
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from llava.eval.questions import Question, read_jsonl, read_questions
from llava.eval.tasks.base import Grade, Needed, Task, grouped

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS, CONTEXT, REFERENCE, RULES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TURNS = 3  # as often a judge is asked that does not begin with two numbers


@dataclass(frozen=True, kw_only=True)
class LlavaBench(Task):
    """Main metric: the sum of the judge's scores for the answers, in percent of that for GPT-4's.

    A verdict without two scores counts as -1 for both in LLaVA's summary. Here the judge is asked again, and where
    that does not help, the question is left out and counted in `unjudged`.
    """

    def read(self, folder: Path) -> list[Question]:
        """Questions with the captions of their pictures, GPT-4's answers and the rules for the judge."""
        rules = _read_rules(folder / RULES)
        captions = {row.get("image"): row.get("caption") for _, row in read_jsonl(folder / CONTEXT)}
        answers = {row.get("question_id"): row.get("text") for _, row in read_jsonl(folder / REFERENCE)}
        questions = []
        for question in read_questions(folder / QUESTIONS):
            caption, reference = (
                captions.get(question.images[0] if question.images else None),
                answers.get(question.question_id),
            )
            rule = rules.get(f"llava_bench_{question.category}")
            for name, found in ((CONTEXT, caption), (REFERENCE, reference), (RULES, rule)):
                if found is None:
                    raise ValueError(f"{folder / name} has nothing for question {question.question_id} of {QUESTIONS}")
            context = caption if isinstance(caption, str) else "\n".join(caption or ())
            facts = {"category": question.category, "context": context, "reference": reference, "rule": rule}
            questions.append(question.with_facts(**facts))
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`reference` and `answer`, the judge's scores of GPT-4's answer and of this one; None where it gave none."""
        assert judge is not None
        prompt = judge_prompt(question, answer)
        scores = None
        for turn in range(TURNS):
            verdict = judge.ask(prompt, system=SYSTEM, temperature=0.2, turn=turn)
            scores = parse_scores(verdict.text)
            if scores is not None:
                break
        reference, own = scores or (None, None)
        category = question.facts["category"]
        return {"category": category, "reference": reference, "answer": own, "judge": verdict.model}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`score` over all, and by category; both mean scores, from 1 to 10."""
        judged = [grade for grade in grades if grade["answer"] is not None]
        parts = {f"score_{name}": _relative(part) for name, part in grouped(judged, "category").items()}
        means = {f"mean_{key}": fmean(grade[key] for grade in judged) for key in ("reference", "answer") if judged}
        return {"score": _relative(judged), **parts, **means, "unjudged": float(len(grades) - len(judged))}


def judge_prompt(question: Question, answer: str) -> str:
    """What LLaVA's program sends to the judge: captions, question, both answers, and the category's rule."""
    facts, role = question.facts, question.facts["rule"]["role"]
    answers = [
        f"[{role} {number}]\n{text}\n\n[End of {role} {number}]\n\n"
        for number, text in enumerate((facts["reference"], answer), start=1)
    ]
    head = f"[Context]\n{facts['context']}\n\n[Question]\n{question.text}\n\n"
    return f"{head}{''.join(answers)}[System]\n{facts['rule']['prompt']}\n\n"


def parse_scores(verdict: str) -> tuple[float, float] | None:
    """The two scores that stand alone in a verdict's first line; None where there are not just two."""
    try:
        reference, answer = (float(part) for part in verdict.split("\n")[0].replace(",", " ").split())
    except ValueError:
        return None
    return reference, answer


def _relative(grades: Sequence[Grade]) -> float:
    reference = sum(grade["reference"] for grade in grades)
    return 100 * sum(grade["answer"] for grade in grades) / reference if reference else float("nan")


def _read_rules(file: Path) -> dict[str, dict[str, str]]:
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): {"role": rule["role"], "prompt": rule["prompt"]} for name, rule in rules.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected LLaVA's rules, {{category: {{role, prompt}}}} ({error!r})") from error


_SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
TASKS = (
    LlavaBench(
        name="llavabench",
        title="LLaVA-Bench",
        folder="llava-bench-in-the-wild",
        needs=(
            *(Needed(name, _SOURCE) for name in (QUESTIONS, CONTEXT, REFERENCE, "images")),
            Needed(RULES, "llava/eval/table/rule.json of https://github.com/haotian-liu/LLaVA"),
        ),
        main="score",
        published={"LLaVA-Bench": "score"},
        images="images",
        max_new_tokens=1024,
        judged=True,
    ),
)
