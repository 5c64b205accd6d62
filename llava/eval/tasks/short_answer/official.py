"""What benchmarks share whose questions come from their official files: reading them, and asking as LLaVA does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, SHORT_ANSWER
from llava.data.preprocessing import is_unicode
from llava.eval.questions import Question, read_json

LLAVA_FILES = "LLaVA's eval.zip"


def read_rows(file: Path, key: str | None = None, **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The objects of a JSON list.

    Args:
        file: which exists.
        key: under which the list stands in an object; None: it is the whole file.
        kinds: keys that each object must have, and of what types.

    Raises:
        ValueError: there is no such list, or an object is not as expected; file and entry are named.
    """
    content = read_json(file, list if key is None else dict)
    rows = content if key is None else content.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: {key!r} is no list; it should be the benchmark's official file")
    return [checked(row, f"{file}, entry {number}", **kinds) for number, row in enumerate(rows)]


def checked(row: Any, where: str, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The row, if it is an object that has these keys with values of these types, lists among them not empty.

    Raises:
        ValueError: it is not; the key is named.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key, kind in kinds.items():
        value = row.get(key)
        if not isinstance(value, kind) or value == [] or (isinstance(value, str) and not is_unicode(value)):
            names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: {key!r} is {value!r:.100}; expected {names}, not empty")
    return row


def texts_of(answers: Iterable[Any], where: str) -> list[str]:
    """What annotators said, of a list of {"answer": text}.

    Raises:
        ValueError: one said nothing of the kind.
    """
    return [checked(answer, where, answer=str)["answer"] for answer in answers]


def short_question(question_id: int | str, text: str, image: str, hint: str = "", **facts: Any) -> Question:
    """A question for a word or phrase, in LLaVA's words; questions of one image form a group.

    Args:
        hint: a line before the one that asks for a short answer.
    """
    lines = [text.replace(DEFAULT_IMAGE_TOKEN, "").strip(), hint, SHORT_ANSWER]
    return Question(question_id, "\n".join(line for line in lines if line), (image,), facts=facts, group=image)


def write_json(file: Path, rows: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Write a list of objects as a server wants them; returns the one file."""
    file.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
    return [file]
