"""LLaVA's `model_vqa_mmbench`: questions with options and images in one table, as of MMBench.

python -m llava.eval.model_vqa_mmbench --model-path CHECKPOINT --question-file Q.tsv --answers-file A
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from llava.eval.model_vqa import build_parser, eval_model
from llava.eval.questions import LETTER_ONLY, Question

LETTERS = "ABCD"
COLUMNS = ("index", "image", "question")
_EMPTY = ("", "nan", "none", "null", "n/a", "na", "<na>", "#n/a")  # what stands for no value, in small letters


def read_mmbench_questions(
    path: str | Path, letter_only: bool = False, all_rounds: bool = False, lang: str = "en"
) -> list[Question]:
    """Questions of a table with tabs: index, image (base64), question, hint, A, B, C, D.

    Args:
        path: the file.
        letter_only: ask for the option's letter.
        all_rounds: ask as often as there are options, each time with the first moved to the end.
        lang: en or cn, of what `letter_only` adds.

    Raises:
        ValueError: the file is missing, or a row is; the line is named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it should be a table with tabs and the columns {', '.join(COLUMNS)}")
    csv.field_size_limit(2**31 - 1)  # images are long
    questions: list[Question] = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            questions += _rounds(row, where, LETTER_ONLY[lang] if letter_only else None, all_rounds)
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _rounds(row: Mapping[str, str | None], where: str, ending: str | None, all_rounds: bool) -> Iterator[Question]:
    missing = [name for name in COLUMNS if not row.get(name)]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; a row needs {', '.join(COLUMNS)}")
    name = row["index"] or ""
    try:
        picture = base64.b64decode(row["image"] or "")
    except binascii.Error as error:
        raise ValueError(f"{where}: the image is not valid base64 ({error})") from error
    values = [row.get(letter) for letter in LETTERS]
    options = values[: next((i for i, value in enumerate(values) if _is_empty(value)), len(values))]
    letters = list(LETTERS[: len(options)])
    hint = [] if _is_empty(row.get("hint")) else [row["hint"]]
    for number in range(len(options) if all_rounds else 1):
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        prompt = "\n".join(str(line) for line in [*hint, row["question"], *listed])
        more = {"round_id": number, "prompt": prompt, "options": list(options), "option_char": list(letters)}
        text = prompt if ending is None else f"{prompt}\n{ending}"
        yield Question(int(name) if name.isdigit() else name, text, pictures=(picture,), row=more)
        options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def _is_empty(value: str | None) -> bool:
    return value is None or value.lower() in _EMPTY


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `llava.eval.model_vqa`."""
    parser = build_parser()
    parser.add_argument("--all-rounds", action="store_true", help="ask with the options in each order of a circle")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    parser.add_argument("--lang", default="en", choices=tuple(LETTER_ONLY))
    args = parser.parse_args(argv)
    names = {"letter_only": "single_pred_prompt", "all_rounds": "all_rounds", "lang": "lang"}
    reading = {name: getattr(args, flag) for name, flag in names.items()}
    for flag in names.values():
        delattr(args, flag)
    eval_model(args, partial(read_mmbench_questions, **reading))


if __name__ == "__main__":
    main()
