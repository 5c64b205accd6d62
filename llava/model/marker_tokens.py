"""Tokens that stand around an image or in its place: the vocabulary of tokenizer and model grows with them."""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.weights import load_into, read_weights


def add_marker_tokens(model: Any, model_args: Any, tokenizer: Any) -> None:
    """Add the marker tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` ask for.

    New rows of the embeddings start at the mean of the old ones.

    Args:
        model: LLaVA's model with its head.
        model_args: with those two flags, and `pretrain_mm_mlp_adapter`, which may hold trained embeddings.
        tokenizer: gets the tokens too.
    """
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
    if model_args.mm_use_im_start_end:
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if tokens and tokenizer.add_tokens(tokens, special_tokens=True):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    if model_args.mm_use_im_start_end and adapter is not None:
        trained = {k: v for k, v in read_weights(adapter).items() if k.endswith("embed_tokens.weight")}
        load_into(model.get_model(), trained, adapter, prefix="model.")
