"""LLaVA's `model_vqa_science`: questions that are conversations, as of ScienceQA, with or without an image.

python -m llava.eval.model_vqa_science --model-path CHECKPOINT --image-folder DIR --question-file Q --answers-file A
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llava.eval.model_vqa import build_parser, eval_model
from llava.eval.tasks.choices.scienceqa import read_science_questions


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
