"""Samples as a data file has them: a JSON list, JSON lines, or Parquet; read from front to back, never whole.

Any path that fsspec opens will do, `s3://` say, and a compressed one where its name says so (.gz).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

CHUNK = 1 << 20
"""Characters that are read at a time of a JSON list."""

PARQUET_ROWS = 256
"""Rows that are read at a time of a Parquet file: few, since they may hold images."""

MAX_SAMPLE = 1 << 26
"""Characters of the longest sample that is read, so that a broken or hostile file does not fill the memory."""

_SPACE = re.compile(r"[ \t\n\r]*")


class DataError(ValueError):
    """Data that cannot be used. The message stays one sentence when the error comes from a data worker.

    torch makes the exception of a worker anew from one text: the worker's traceback, at whose end the message stands.
    """

    def __init__(self, message: str) -> None:
        cls = type(self)
        super().__init__(message.rpartition(f"{cls.__module__}.{cls.__qualname__}: ")[2].rstrip("\n"))


@dataclass(frozen=True)
class Malformed:
    """What stands in the place of a sample that cannot be decoded.

    Attributes:
        reason: in one sentence, with file and line.
    """

    reason: str


def read_records(path: str) -> Iterator[Any]:
    """Decoded samples of one file, in order; by its name JSON lines (.jsonl), Parquet (.parquet), otherwise a list.

    A line that cannot be decoded is a `Malformed`, and the next one is read. Of the other kinds nothing can be read
    after such a place.

    Raises:
        DataError: malformed JSON (with file, line and column), not UTF-8, no list, no Parquet, torn, or no such file.
    """
    with reading(path):
        name = path.removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif name.endswith(".jsonl"):
            yield from _json_lines(path)
        else:
            yield from _json_list(path)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Name a data file in all that goes wrong while it is read.

    Raises:
        DataError: in place of any other error.
    """
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path!r} is not UTF-8 ({error}); convert it") from error
    except FileNotFoundError as error:
        raise DataError(f"data file {path!r} does not exist; check data_path") from error
    except Exception as error:  # of the kinds of fsspec, of each object store, of each compression and of Parquet
        reason = " ".join(f"{error!s:.300}".split()) or type(error).__name__
        kind = "is no whole Parquet file" if path.endswith(".parquet") else "cannot be read"
        raise DataError(
            f"data file {path!r} {kind} ({reason}); check that it can be reached, and write or download it again if it "
            "was cut off"
        ) from error


def decode_json(text: str | bytes) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: malformed, a json.JSONDecodeError where the place is known; nested too deeply; not UTF-8.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _json_lines(path: str) -> Iterator[Any]:
    import fsspec

    with fsspec.open(path, "rb", compression="infer") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield _decode_line(text, path, number)


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    while line := file.readline(MAX_SAMPLE + 1):
        if len(line) > MAX_SAMPLE:
            raise DataError(f"data file {path!r} has a line of more than {MAX_SAMPLE} bytes; are these JSON lines?")
        yield line


def _decode_line(line: bytes, path: str, number: int) -> Any:
    try:
        return decode_json(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return Malformed(str(_malformed(path, number, error.colno, error.msg)))
    except UnicodeDecodeError as error:
        return Malformed(f"data file {path!r} is not UTF-8 at line {number} ({error.reason}); convert it")
    except ValueError as error:
        return Malformed(f"data file {path!r} cannot be used at line {number}: {error}")


def _malformed(path: str, line: int, column: int, reason: str) -> DataError:
    return DataError(
        f"data file {path!r} is malformed JSON at line {line}, column {column}: {reason}; "
        "mend that place, or write the file again if it was cut off"
    )


def _json_list(path: str) -> Iterator[Any]:
    import fsspec

    # newline="\n": JSON strings may hold other characters that Python takes for line ends.
    with fsspec.open(path, "rt", encoding="utf-8-sig", newline="\n", compression="infer") as file:
        yield from _list_items(_Window(file, path), path)


def _list_items(text: _Window, path: str) -> Iterator[Any]:
    if text.peek() != "[":
        value = text.value() if text.peek() else text.fail("Expecting value")
        raise DataError(
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
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
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
            except RecursionError as error:
                self.fail("nested too deeply", error)
            except json.JSONDecodeError as error:
                # What was read so far may end within the value. Doubling keeps the work linear.
                offset = error.pos - self._at
                if len(self._text) - self._at > MAX_SAMPLE:
                    self.fail(f"{error.msg}, or a sample of more than {MAX_SAMPLE} characters", error)
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
        """Raise a DataError that names the present place."""
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
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()


def count_parquet_rows(path: str) -> int:
    """Number of samples of a Parquet file, as the file itself says.

    Raises:
        DataError: it cannot be read.
    """
    import fsspec
    import pyarrow.parquet as pq

    with reading(path), fsspec.open(path, "rb") as file:
        rows: int = pq.ParquetFile(file).metadata.num_rows
    return rows


def size_of(path: str) -> int:
    """Bytes of a data file; 0 where its place does not say.

    Raises:
        DataError: it cannot be asked for.
    """
    import fsspec

    with reading(path):
        system, place = fsspec.core.url_to_fs(path)
        return int(system.size(place) or 0)
