"""LLaVA's `model_vqa_loader`: `model_vqa` for benchmarks with short answers.

python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --image-folder DIR --question-file Q --answers-file A
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.model_vqa import build_parser, eval_model


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `llava.eval.model_vqa`."""
    eval_model(build_parser(max_new_tokens=128).parse_args(argv))


if __name__ == "__main__":
    main()
