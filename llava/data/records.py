"""Samples as a data file has them: a JSON list, JSON lines, or Parquet; read from front to back, never whole.

Any path that fsspec opens will do, `s3://` say, and a compressed one where its name says so (.gz).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
"""Characters that are read at a time of a JSON list."""

PARQUET_ROWS = 256
"""Rows that are read at a time of a Parquet file: few, since they may hold images."""


def read_records(path: str) -> Iterator[Any]:
    """Decoded samples of one file, in order; by its name JSON lines (.jsonl), Parquet (.parquet), else a JSON list.

    Raises:
        ValueError: malformed JSON (with file, line and column), not UTF-8, no list, no Parquet, or no such file.
    """
    import fsspec

    name = path.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(path)
            return
        # newline="\n": JSON strings may hold other characters that Python takes for line ends.
        with fsspec.open(path, "rt", encoding="utf-8-sig", newline="\n", compression="infer") as file:
            yield from (_json_lines if name.endswith(".jsonl") else _json_list)(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path!r} is not UTF-8 ({error}); convert it") from error
    except FileNotFoundError as error:
        raise ValueError(f"data file {path!r} does not exist; check data_path") from error


def _json_lines(file: TextIO, path: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(path, number + error.lineno - 1, error.colno, error.msg) from error


def _malformed(path: str, line: int, column: int, reason: str) -> ValueError:
    return ValueError(
        f"data file {path!r} is malformed JSON at line {line}, column {column}: {reason}; "
        "mend that place, or write the file again if it was cut off"
    )


def _json_list(file: TextIO, path: str) -> Iterator[Any]:
    text = _Window(file, path)
    if text.peek() != "[":
        value = text.value() if text.peek() else text.fail("Expecting value")
        raise ValueError(
            f"data file {path!r} holds a JSON {type(value).__name__}, expected a list of samples; "
            "name a file of JSON lines *.jsonl"
        )
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            mark = text.peek()
            if mark not in (",", "]"):
                text.fail("Expecting ',' delimiter")
            text.skip()
            if mark == "]":
                break
    if text.peek():
        text.fail("Extra data")


class _Window:
    """The part of a JSON text that is being decoded; what lies before it is forgotten."""

    def __init__(self, file: TextIO, path: str) -> None:
        self._file, self._path = file, path
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._line, self._column = 1, 1  # of the first character of `_text`

    def peek(self) -> str:
        """The next character that is no white space, which becomes the present one; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text) or not self._read(CHUNK):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go over the present character."""
        self._at += 1

    def value(self) -> Any:
        """Decode the value that begins at the next character that is no white space."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What was read so far may end within the value. Doubling keeps the work linear.
                offset = error.pos - self._at
                if self._read(size):
                    size *= 2
                    continue
                self._at += offset
                self.fail(error.msg, error)
            # A number that reaches the end of what was read may go on.
            length = end - self._at
            if end < len(self._text) or not self._read(size):
                self._at += length
                return value

    def fail(self, reason: str, cause: Exception | None = None) -> Any:
        """Raise a ValueError that names the present place."""
        self._forget()
        raise _malformed(self._path, self._line, self._column, reason) from cause

    def _read(self, size: int) -> bool:
        self._forget()
        more = self._file.read(size)
        self._text += more
        return bool(more)

    def _forget(self) -> None:
        """Drop what lies before the present place."""
        gone, self._text = self._text[: self._at], self._text[self._at :]
        lines = gone.count("\n")
        self._line += lines
        self._column = len(gone) - gone.rfind("\n") if lines else self._column + len(gone)
        self._at = 0


def _parquet_rows(path: str) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"data file {path!r} is no whole Parquet file ({error}); write or download it again"
            ) from error
