"""LLaVA's `run_llava`: one question about images.

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file a.png,b.png --query "What differs?"
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.conversation import get_template
from llava.data.media.images import open_image
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

logger = logging.getLogger(__name__)

# As LLaVA chooses where no template is named: the first of these that is in the checkpoint's name.
CONV_MODES = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
    "": "llava_v0",
}


def conv_mode_of(model_name: str) -> str:
    """The template that LLaVA takes for a checkpoint of this name."""
    return next(mode for part, mode in CONV_MODES.items() if part in model_name.lower())


def eval_model(args: Any) -> str:
    """Answer `args.query` about `args.image_file`, write the answer to the terminal and return it.

    Args:
        args: as LLaVA's README makes them, or `main`: model_path, model_base, query, image_file (names with `sep`
            between them, or a list), conv_mode (None: as `conv_mode_of`), temperature, top_p, num_beams,
            max_new_tokens; and tokenizer, model and image_processor where they are open already.

    Raises:
        ValueError: the checkpoint or an image cannot be read; it is named.
    """
    tokenizer, model, image_processor = _opened(args)
    mode = args.conv_mode
    if mode is None:
        mode = conv_mode_of(get_model_name_from_path(args.model_path))
        logger.warning("no --conv-mode: %s, by the name of %s", mode, args.model_path)
    files = args.image_file.split(args.sep) if isinstance(args.image_file, str) else args.image_file
    pictures = [open_image(file) for file in files]
    conversation = get_template(mode).copy()
    marked = bool(getattr(model.config, "mm_use_im_start_end", False))
    conversation.append_message(conversation.roles[0], place_markers(args.query, len(pictures), marked))
    ids = torch.tensor([tokenizer_image_token(conversation.get_prompt(), tokenizer)], device=model.device)
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    new = model.generate(
        ids,
        images=list(process_images(pictures, image_processor, model.config)),
        image_sizes=[picture.size for picture in pictures],
        do_sample=args.temperature > 0,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        **sampling,
    )
    answer: str = tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()
    sys.stdout.write(f"{answer}\n")
    return answer


def place_markers(query: str, num_images: int, marked: bool) -> str:
    """A query with `<image>` where it has placeholders; without any, in front, a line for each image."""
    text = query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    if DEFAULT_IMAGE_TOKEN not in text:
        text = f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    surrounded = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
    return text.replace(DEFAULT_IMAGE_TOKEN, surrounded) if marked else text


def _opened(args: Any) -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor of `args`, or opened by its paths."""
    given: list[Any] = [getattr(args, name, None) for name in ("tokenizer", "model", "image_processor")]
    if all(part is not None for part in given):
        return given[0], given[1], given[2]
    return load_pretrained_model(args.model_path, args.model_base)[:3]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answer one question about images.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--image-file", required=True)
    parser.add_argument("--query", required=True)
    parser.add_argument("--conv-mode", default=None)
    parser.add_argument("--sep", default=",")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    eval_model(parser.parse_args(argv))


if __name__ == "__main__":
    main()
