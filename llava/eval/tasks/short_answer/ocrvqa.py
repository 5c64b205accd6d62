"""OCR-VQA: who wrote this book, what is its title, of what kind is it? Questions about covers; the test set.

Paper: https://anandmishra22.github.io/files/mishra-OCR-VQA.pdf. LLaVA's release has no evaluation files of it, so the
official one is read, with the pictures as LLaVA's training data names them; asked as LLaVA asks for short answers, as
VLMEvalKit does. LLaVA's 665k hold questions about 80,000 covers of the training set. PyramidDrop's paper does not say
how its figure came about; VLMEvalKit, which it used in part, also offers a sample of this set (OCRVQA_TESTCORE).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.accuracy import normalize
from llava.eval.questions import Question, read_json
from llava.eval.tasks.base import Grade, Needed, Task
from llava.eval.tasks.short_answer.official import checked, short_question

if TYPE_CHECKING:
    from llava.eval.judge import Judge

DATASET = "dataset.json"
TEST_SPLIT = 3  # 1 is for training, 2 for validation


@dataclass(frozen=True, kw_only=True)
class OcrVqa(Task):
    """Exact match, but for case, spaces and a period at the end."""

    def read(self, folder: Path) -> list[Question]:
        """Of the official file: all questions of a cover stand together."""
        file = folder / DATASET
        books = read_json(file, dict).items()
        return [
            question
            for name, book in books
            if checked(book, f"{file}, {name}", split=int)["split"] == TEST_SPLIT
            for question in self._questions(name, book, file)
        ]

    def _questions(self, name: str, book: dict[str, Any], file: Path) -> Iterator[Question]:
        where = f"{file}, {name}"
        checked(book, where, questions=list, answers=list, imageURL=str)
        if len(book["questions"]) != len(book["answers"]):
            raise ValueError(f"{where}: {len(book['questions'])} questions, {len(book['answers'])} answers")
        image = self._image(name, book["imageURL"], file.parent)
        for number, (text, answer) in enumerate(zip(book["questions"], book["answers"], strict=True)):
            yield short_question(f"{name}-{number}", str(text), image, answer=str(answer))

    def _image(self, name: str, url: str, folder: Path) -> str:
        """LLaVA's training data names all pictures .jpg; the official program keeps the ending of the address."""
        official = f"{name}{Path(url).suffix}"
        return official if (folder / self.images / official).is_file() else f"{name}.jpg"

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`: 0 or 1."""
        return {"score": float(normalize(answer) == normalize(question.facts["answer"]))}


_OCRVQA = "https://ocr-vqa.github.io"
TASKS = (
    OcrVqa(
        name="ocrvqa",
        title="OCRVQA",
        folder="ocrvqa",
        needs=(
            Needed(DATASET, _OCRVQA),
            Needed("images", f"{_OCRVQA}, loadDataset.py; or a link to playground/data/ocr_vqa/images"),
        ),
        main="accuracy",
        published={"OCRVQA": "accuracy"},
        images="images",
    ),
)
