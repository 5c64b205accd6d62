"""LLaVA's `model_vqa_mmbench`: questions with options and images in one table, as of MMBench.

python -m llava.eval.model_vqa_mmbench --model-path CHECKPOINT --question-file Q.tsv --answers-file A
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llava.eval.model_vqa import build_parser, eval_model
from llava.eval.questions import LETTER_ONLY
from llava.eval.tasks.choices.mmbench import read_mmbench_questions


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
