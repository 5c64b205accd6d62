"""Question and answer files: JSON lines, as LLaVA's evaluation has them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.data.preprocessing import is_unicode
from llava.data.records import decode_json
from llava.data.samples import MAX_IMAGES, BadSampleError, video_files

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
        text: the question, without `<image>` and `<video>`.
        images: files it is about, relative to the image folder.
        answer: the right answer, where the file has it.
        category: the question's type, where the file has it.
        pictures: images as the contents of their files, where the question's own file holds them; after `images`.
        row: keys of the answer's row besides the usual ones, or in place of them.
        facts: what the grading of its answer needs.
        answer_key: a further key under which the answer's row has the answer.
        group: questions of one group are not independent (two of one picture, one in several orders); intervals
            resample whole groups. None: it stands alone.
        videos: clips it is about, after the images: names of files or folders relative to the folder of clips, or of
            a clip's frames.
    """

    question_id: int | str
    text: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    category: str | None = None
    pictures: tuple[bytes, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    answer_key: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
    videos: tuple[str | list[str], ...] = ()

    def with_facts(self, **facts: Any) -> Question:
        """The same question with more facts."""
        return replace(self, facts={**self.facts, **facts})

    def in_image_group(self) -> Question:
        """The same question in the group of its first image; alone without one."""
        return replace(self, group=next(iter(self.images), None))


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


def read_json(path: str | Path, kind: type, what: str | None = None) -> Any:
    """Content of a JSON file.

    Args:
        path: the file.
        kind: list or dict.
        what: it should be, for the messages.

    Raises:
        ValueError: the file is missing, no JSON or of another kind; file and line are named.
    """
    what = what or f"a JSON {kind.__name__}"
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it should be {what}")
    try:
        content = decode_json(Path(path).read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); it should be {what}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON ({error}); it should be {what}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}; it should be {what}")
    return content


def read_json_list(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (file and entry, for messages) and entry of a JSON list of objects.

    Raises:
        ValueError: as `read_json`, or the list is empty or has other entries.
    """
    rows = read_json(path, list, what)
    if not rows:
        raise ValueError(f"{path} holds an empty list; it should be {what}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {index}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}, entry {index}", row


def read_table(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Place (file and line, for messages) and cells of every row of a table with tabs.

    Args:
        path: the file; its first line names the columns.
        columns: those in which every row must have something.

    Raises:
        ValueError: the file is missing, not UTF-8, or a row lacks something; the line is named.
    """
    needed = ", ".join(columns)
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it should be a table with tabs and the columns {needed}")
    csv.field_size_limit(2**31 - 1)  # images are long
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        try:
            for row in rows:
                if None in row:
                    raise ValueError(f"{path}, line {rows.line_num}: more cells than the table has columns")
                missing = [name for name in columns if not row.get(name)]
                if missing:
                    raise ValueError(f"{path}, line {rows.line_num}: no {', '.join(missing)}; a row needs {needed}")
                yield f"{path}, line {rows.line_num}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it") from error


def read_questions(path: str | Path) -> list[Question]:
    """Questions of LLaVA's question.jsonl: question_id, text, and image (a name, a list of them, or none).

    So may `video` be, as in training data. `answer` and `category` are kept where they stand.

    Raises:
        ValueError: a line lacks question_id or text, or has an image or clip that is no name; or there is no question
            at all. File and line are named.
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
    try:
        videos = tuple(video_files(row, where))
    except BadSampleError as error:
        raise ValueError(str(error)) from error
    text = row["text"].replace(DEFAULT_IMAGE_TOKEN, "").replace(DEFAULT_VIDEO_TOKEN, "").strip()
    return Question(row["question_id"], text, tuple(images), row.get("answer"), row.get("category"), videos=videos)


def get_chunk(items: Sequence[T], num_chunks: int, chunk_idx: int) -> Sequence[T]:
    """Part `chunk_idx` (from 0) of `num_chunks`, cut as LLaVA cuts: all parts of equal size but the last.

    Raises:
        ValueError: there is no such chunk.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise ValueError(f"chunk_idx={chunk_idx} of num_chunks={num_chunks}: expected 0 <= chunk_idx < num_chunks")
    size = math.ceil(len(items) / num_chunks)
    return items[chunk_idx * size : (chunk_idx + 1) * size]
