"""LLaVA's `model_vqa_qbench`: questions with options about how good a picture is; answers are Q-Bench's `response`.

python -m llava.eval.model_vqa_qbench --model-path CHECKPOINT --image-folder DIR --questions-file Q --answers-file A
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llava.eval.model_vqa import build_parser, eval_model
from llava.eval.tasks.choices.qbench import INTRODUCTION, read_qbench_questions


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `llava.eval.model_vqa`."""
    parser = build_parser(temperature=0.0)
    parser.add_argument("--lang", default="en", choices=tuple(INTRODUCTION))
    args = parser.parse_args(argv)
    lang = args.lang
    del args.lang
    eval_model(args, partial(read_qbench_questions, lang=lang))


if __name__ == "__main__":
    main()
