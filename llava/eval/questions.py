"""Question and answer files: JSON lines, as LLaVA's evaluation has them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.preprocessing import is_unicode
from llava.data.records import decode_json
from llava.data.samples import MAX_IMAGES

T = TypeVar("T")

# What benchmarks with options add to a question, by language, as models of LLaVA-1.5 were trained to read it.
LETTER_ONLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        question_id: number or text; the image's name in some of LLaVA's files (TextVQA, MME), which then repeats.
        text: the question, without `<image>`.
        images: files it is about, relative to the image folder.
        answer: the right answer, where the file has it.
        category: the question's type, where the file has it.
        pictures: images as the contents of their files, where the question's own file holds them; after `images`.
        row: keys of the answer's row besides the usual ones, or in place of them.
        facts: what the grading of its answer needs.
        group: questions of one group are not independent (two of one picture, one in several orders); intervals
            resample whole groups. None: it stands alone.
    """

    question_id: int | str
    text: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    category: str | None = None
    pictures: tuple[bytes, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None

    def with_facts(self, **facts: Any) -> Question:
        """The same question with more facts."""
        return replace(self, facts={**self.facts, **facts})


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of every line that is not blank.

    Raises:
        ValueError: the file is missing, or a line is no JSON object; file and line are named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it should be a file of JSON lines")
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = decode_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def read_questions(path: str | Path) -> list[Question]:
    """Questions of LLaVA's question.jsonl: question_id, text, and image (a name, a list of them, or none).

    `answer` and `category` are kept where they stand.

    Raises:
        ValueError: a line lacks question_id or text, or has an image that is no name; or there is no question at all.
            File and line are named.
    """
    questions = [_parse_question(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _parse_question(row: dict[str, Any], where: str) -> Question:
    for key, kinds in (("question_id", (int, str)), ("text", (str,))):
        if not isinstance(row.get(key), kinds) or isinstance(row[key], bool):
            raise ValueError(f"{where}: {key!r} is missing or of the wrong type; a question needs question_id and text")
    if not is_unicode(row["text"]):
        raise ValueError(f"{where}: 'text' holds half a character (a lone surrogate); write it anew")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f"{where}: 'image' must be a file name or a list of them, got {row['image']!r:.200}")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{where}: it has {len(images)} images, at most {MAX_IMAGES} are read")
    text = row["text"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return Question(row["question_id"], text, tuple(images), row.get("answer"), row.get("category"))


def get_chunk(items: Sequence[T], num_chunks: int, chunk_idx: int) -> Sequence[T]:
    """Part `chunk_idx` (from 0) of `num_chunks`, cut as LLaVA cuts: all parts of equal size but the last.

    Raises:
        ValueError: there is no such chunk.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise ValueError(f"chunk_idx={chunk_idx} of num_chunks={num_chunks}: expected 0 <= chunk_idx < num_chunks")
    size = math.ceil(len(items) / num_chunks)
    return items[chunk_idx * size : (chunk_idx + 1) * size]
