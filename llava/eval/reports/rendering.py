"""A table of a report, on a terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MISSING = "-"
"""The cell of what is not known; empty in CSV."""
FORMATS = ("table", "csv", "markdown")
WIDEST = 1000  # characters: a table keeps its width, for a cell that is cut off is worse than a line that wraps


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Attributes:
        columns: their names.
        rows: cells, as many as there are columns.
        title: above it.
        notes: sentences below it.
        words: how many columns, from the first one, hold words and not numbers.
        grouped: draw a line where the first cell changes.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    words: int = 1
    grouped: bool = False


def render(sheets: Sequence[Sheet], form: str, file: TextIO) -> None:
    """Write tables in one of `FORMATS`. CSV has no notes.

    Raises:
        ValueError: there is no such format.
    """
    if form not in FORMATS:
        raise ValueError(f"--format {form}: choose {', '.join(FORMATS)}")
    if form == "table":
        _draw(sheets, file)
    else:
        write = _as_csv if form == "csv" else _as_markdown
        file.write("\n".join(map(write, sheets)))


def _draw(sheets: Sequence[Sheet], file: TextIO) -> None:
    console = Console(file=file, width=WIDEST, highlight=False)
    for sheet in sheets:
        table = Table(title=escape(sheet.title), title_justify="left")
        for number, column in enumerate(sheet.columns):
            table.add_column(escape(column), justify="left" if number < sheet.words else "right", no_wrap=True)
        for row, following in zip(sheet.rows, [*sheet.rows[1:], None], strict=True):
            last = sheet.grouped and following is not None and following[0] != row[0]
            table.add_row(*map(escape, row), end_section=last)
        console.print(table)
        for note in sheet.notes:
            console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def _as_csv(sheet: Sheet) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(sheet.columns)
    writer.writerows([["" if cell == MISSING else cell for cell in row] for row in sheet.rows])
    return text.getvalue()


def _as_markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---" if number < sheet.words else "---:" for number in range(len(sheet.columns))]
    title = [f"### {sheet.title}", ""] if sheet.title else []
    notes = ["", *(f"- {note.replace('*', chr(92) + '*')}" for note in sheet.notes)] if sheet.notes else []
    rows = [[cell.replace("*", "\\*") for cell in row] for row in sheet.rows]
    return "\n".join([*title, line(sheet.columns), line(rule), *map(line, rows), *notes, ""])
