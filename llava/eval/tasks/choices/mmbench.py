"""MMBench: questions with options about many abilities, each asked with its options in every order of a circle.

Paper: https://arxiv.org/abs/2307.06281
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.questions import LETTER_ONLY, Question, read_table
from llava.eval.scoring.choices import inferred_letter, list_options
from llava.eval.tasks.base import Grade, Needed, Task, grouped, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

LETTERS = "ABCD"
COLUMNS = ("index", "image", "question")
ORDERS = 1_000_000  # rows of one question in several orders have the same index but for a multiple of this
_EMPTY = ("", "nan", "none", "null", "n/a", "na", "<na>", "#n/a")  # what stands for no value, in small letters
# Columns of the table that LLaVA leaves out of what the server gets.
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")


def read_mmbench_questions(
    path: str | Path, letter_only: bool = False, all_rounds: bool = False, lang: str = "en"
) -> list[Question]:
    """Questions of a table with tabs: index, image (base64), question, hint, A, B, C, D, and answer where it has one.

    Args:
        path: the file.
        letter_only: ask for the option's letter.
        all_rounds: ask as often as there are options, each time with the first moved to the end.
        lang: en or cn, of what `letter_only` adds.

    Raises:
        ValueError: the file is missing, or a row is; the line is named.
    """
    questions: list[Question] = []
    for where, row in read_table(path, COLUMNS):
        questions += _rounds(row, where, LETTER_ONLY[lang] if letter_only else None, all_rounds)
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _rounds(row: Mapping[str, str | None], where: str, ending: str | None, all_rounds: bool) -> Iterator[Question]:
    name = row["index"] or ""
    try:
        picture = base64.b64decode(row["image"] or "")
    except binascii.Error as error:
        raise ValueError(f"{where}: the image is not valid base64 ({error})") from error
    values = [row.get(letter) for letter in LETTERS]
    options = [str(value) for value in values[: next((i for i, v in enumerate(values) if _is_empty(v)), len(values))]]
    letters = list(LETTERS[: len(options)])
    hint = [] if _is_empty(row.get("hint")) else [row["hint"]]
    for number in range(len(options) if all_rounds else 1):
        prompt = "\n".join(str(line) for line in [*hint, row["question"], *list_options(options)])
        more = {"round_id": number, "prompt": prompt, "options": list(options), "option_char": list(letters)}
        text = prompt if ending is None else f"{prompt}\n{ending}"
        facts = {"cells": {key: value for key, value in row.items() if key not in ("image", "hint")}, "where": where}
        yield Question(int(name) if name.isdigit() else name, text, pictures=(picture,), row=more, facts=facts)
        options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def _is_empty(value: str | None) -> bool:
    return value is None or value.lower() in _EMPTY


@dataclass(frozen=True, kw_only=True)
class MMBench(Task):
    """Main metric: the server's, by which a question counts where it is answered right in each order of its options.

    The table has a row for each order. `accuracy` counts one order of each question, the table's first. An answer whose
    letter no rule finds, which the server shows to a model, is wrong here.

    Attributes:
        table: file name.
        lang: en or cn.
    """

    table: str
    lang: str = "en"

    def check_files(self, data: Path) -> None:
        """Also look for the library that writes the server's file, before questions are answered."""
        super().check_files(data)
        if find_spec("openpyxl") is None:
            raise ValueError(f"task {self.name}: its server reads Excel tables: pip install 'llava[eval]'")

    def read(self, folder: Path) -> list[Question]:
        """A question for each row, as LLaVA asks it."""
        first: set[str] = set()
        questions = []
        for question in read_mmbench_questions(folder / self.table, letter_only=True, lang=self.lang):
            cells, letters = question.facts["cells"], question.row["option_char"]
            if cells.get("answer") not in letters:
                raise ValueError(
                    f"{question.facts['where']}: 'answer' is {cells.get('answer')!r}, expected one of {letters}: "
                    "use the table of the dev set, which has the answers"
                )
            name = question.question_id
            group = str(name % ORDERS if isinstance(name, int) else name)
            ability = cells.get("l2-category") or ""
            facts = {"answer": cells["answer"], "first": group not in first, "ability": ability}
            questions.append(replace(question.with_facts(**facts), group=group))
            first.add(group)
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, with what `summarize` needs."""
        options = dict(zip(LETTERS, question.row["options"], strict=False))
        right = inferred_letter(answer, options) == question.facts["answer"]
        kept = {key: question.facts[key] for key in ("first", "ability")}
        return {"score": float(right), "question": question.group, **kept}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`accuracy` of the first orders, `circular`, and the latter by ability."""
        lowest = {name: min(grade["score"] for grade in part) for name, part in grouped(grades, "question").items()}
        firsts = [grade for grade in grades if grade["first"]]
        circular = [{**grade, "score": lowest[grade["question"]]} for grade in firsts]
        abilities = {
            f"circular_{name}": percent(grade["score"] for grade in part)
            for name, part in grouped(circular, "ability").items()
            if name
        }
        means = {"accuracy": firsts, "circular": circular}
        return {name: percent(grade["score"] for grade in part) for name, part in means.items()} | abilities

    def write_submission(self, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
        """The table without its long columns, with what was predicted after the options, as an Excel file."""
        from openpyxl import Workbook

        names = [name for name in questions[0].facts["cells"] if name not in _NOT_SUBMITTED]
        book = Workbook(write_only=True)
        sheet = book.create_sheet("Sheet1")
        sheet.append([*names[:6], "prediction", *names[6:]])
        for question, answer in zip(questions, answers, strict=True):
            values = [question.facts["cells"].get(name) for name in names]
            texts = ["" if _is_empty(value) else value for value in values]
            texts[names.index("index")] = question.question_id
            sheet.append([_excel_cell(sheet, text) for text in [*texts[:6], answer, *texts[6:]]])
        file = folder / f"{Path(self.table).stem}.xlsx"
        book.save(file)
        return [file]


def _excel_cell(sheet: Any, value: int | str | None) -> Any:
    """A cell of an Excel table, in which `=1+1` is a text too; None for an empty text."""
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    if not isinstance(value, str) or not value:
        return None if value == "" else value
    cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
    cell.data_type = "s"
    return cell


_SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"


def _mmbench(name: str, title: str, table: str, lang: str) -> MMBench:
    return MMBench(
        name=name,
        title=title,
        folder=name,
        needs=(Needed(table, _SOURCE + table),),
        main="circular",
        published={title: "circular"},
        max_new_tokens=1024,
        table=table,
        lang=lang,
    )


TASKS = (
    _mmbench("mmbench", "MMBench", "mmbench_dev_20230712.tsv", "en"),
    _mmbench("mmbench_cn", "MMBench-CN", "mmbench_dev_cn_20231003.tsv", "cn"),
)
