"""TextVQA: questions whose answers are written in the picture, ten annotators each; the validation set.

Paper: https://arxiv.org/abs/1904.08920. LLaVA's figure, which the papers compare with, is that of `textvqa`: each
question comes with the words that an OCR program read in the picture, so that a model can copy what it does not see.
`textvqa_no_ocr` asks the same questions without them, as lmms-eval does by default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import SHORT_ANSWER
from llava.eval.questions import Question, read_questions
from llava.eval.scoring.vqa import agreement, normalize
from llava.eval.tasks.base import Grade, Needed, Task
from llava.eval.tasks.short_answer.official import LLAVA_FILES, read_rows

if TYPE_CHECKING:
    from llava.eval.judge import Judge

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token:"


def bare_question(prompt: str) -> str:
    """The question in a prompt of LLaVA's files, which have three forms of them.

    Raises:
        ValueError: the prompt has none of them.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found is not None:
            return found.group(1)
    elif f"{OCR} " in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(OCR) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise ValueError(f"{prompt!r:.200} has no line that must be the question; use LLaVA's file")


@dataclass(frozen=True, kw_only=True)
class TextVqa(Task):
    """VQA accuracy, as LLaVA's eval_textvqa and M4C compute it.

    Attributes:
        with_ocr: ask with the OCR tokens of LLaVA's file.
    """

    with_ocr: bool = True

    def read(self, folder: Path) -> list[Question]:
        """LLaVA's questions, with the annotators' answers found by image and question, as LLaVA finds them."""
        file = folder / ANNOTATIONS
        rows = read_rows(file, "data", image_id=str, question=str, answers=list)
        answers = {(row["image_id"], row["question"].lower()): row["answers"] for row in rows}
        return [self._question(question, answers, folder) for question in read_questions(folder / QUESTIONS)]

    def _question(self, question: Question, answers: dict[tuple[Any, str], list[str]], folder: Path) -> Question:
        where = f"{folder / QUESTIONS}, question_id {question.question_id!r}"
        try:
            text = bare_question(question.text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        known = answers.get((question.question_id, text.lower()))
        if known is None or not all(isinstance(answer, str) for answer in known):
            raise ValueError(f"{where}: {ANNOTATIONS} beside it has no answers to {text!r}; use files of v0.5.1")
        asked = question if self.with_ocr else replace(question, text=f"{text}\n{SHORT_ANSWER}")
        return asked.with_facts(answers=known).in_image_group()

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: VQA accuracy, 0 to 1."""
        return {"score": agreement(normalize(answer), [normalize(text) for text in question.facts["answers"]])}


_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
_NEEDS = (
    Needed(QUESTIONS, LLAVA_FILES),
    Needed(ANNOTATIONS, f"{_TEXTVQA}/data/{ANNOTATIONS}"),
    Needed("train_images", f"{_TEXTVQA}/images/train_val_images.zip"),
)
TASKS = (
    TextVqa(
        name="textvqa",
        title="TextVQA",
        folder="textvqa",
        needs=_NEEDS,
        main="accuracy",
        published={"TextVQA": "accuracy"},
        images="train_images",
    ),
    TextVqa(
        name="textvqa_no_ocr",
        title="TextVQA without OCR tokens",
        folder="textvqa",
        needs=_NEEDS,
        main="accuracy",
        images="train_images",
        with_ocr=False,
    ),
)
