"""LLaVA's `model_vqa_science`: questions that are conversations, as of ScienceQA, with or without an image.

python -m llava.eval.model_vqa_science --model-path CHECKPOINT --image-folder DIR --question-file Q --answers-file A
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.model_vqa import build_parser, eval_model
from llava.eval.questions import LETTER_ONLY, Question


def read_science_questions(path: str | Path, letter_only: bool = False) -> list[Question]:
    """Questions of a JSON list of {"id", "image" (optional), "conversations": [{"value": the question}, ...]}.

    Args:
        path: the file.
        letter_only: ask for the option's letter.

    Raises:
        ValueError: the file is missing or no such list; the entry is named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it should be a JSON list of conversations, as LLaVA has ScienceQA")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a JSON list of conversations, with one at least")
    return [_question(row, f"{path}, entry {index}", letter_only) for index, row in enumerate(rows)]


def _question(row: Any, where: str, letter_only: bool) -> Question:
    try:
        name, value, image = row["id"], row["conversations"][0]["value"], row.get("image")
        text = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected id, conversations and the question's value in them ({error!r})") from error
    text += f"\n{LETTER_ONLY['en']}" if letter_only else ""
    prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if image else text
    return Question(name, text, (image,) if image else (), row={"prompt": prompt})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `llava.eval.model_vqa`."""
    parser = build_parser(conv_mode="llava_v0")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    parser.add_argument("--answer-prompter", action="store_true", help="for LLaVA's commands; without effect there too")
    args = parser.parse_args(argv)
    letter_only = args.single_pred_prompt
    del args.single_pred_prompt, args.answer_prompter
    eval_model(args, partial(read_science_questions, letter_only=letter_only))


if __name__ == "__main__":
    main()
