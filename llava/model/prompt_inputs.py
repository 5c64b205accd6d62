"""The ids of a batch with what goes along with them: wrong types, shapes and values are refused before they are used.

Shapes: B samples, S tokens a row of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX

_WHOLE_NUMBERS = (torch.int64, torch.int32)


def check_prompt(input_ids: Any, attention_mask: Any = None, labels: Any = None) -> None:
    """Look at types, shapes and devices; values are not read, so that no device is waited for.

    Raises:
        ValueError: `input_ids` are no [B, S] tensor of whole numbers, or mask or labels do not go with them.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in _WHOLE_NUMBERS:
        raise ValueError(
            f"input_ids are {describe(input_ids)}: expected a tensor [samples, tokens] of int64, e.g. "
            "tokenizer_image_token(prompt, tokenizer, return_tensors='pt').unsqueeze(0)"
        )
    if input_ids.numel() == 0 or input_ids.is_meta:
        raise ValueError(f"input_ids are {describe(input_ids)}: expected at least one token, with its value")
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.shape != input_ids.shape or given.device != input_ids.device:
            raise ValueError(
                f"{name} is {describe(given)}: expected what input_ids are, a tensor of shape "
                f"{tuple(input_ids.shape)} on {input_ids.device}, without places for the tokens of images"
            )
    if labels is not None and labels.dtype not in _WHOLE_NUMBERS:
        raise ValueError(f"labels are {describe(labels)}: expected int64, -100 where nothing is learnt")


def check_device(input_ids: Tensor, device: torch.device) -> None:
    """Raise ValueError where the ids are not on the model's device."""
    if input_ids.device != device:
        raise ValueError(f"input_ids are on {input_ids.device}, the model is on {device}: input_ids.to(model.device)")


def count_markers(input_ids: Tensor, mask: Tensor, vocab_size: int) -> list[int]:
    """Image markers of each sample, [B]. The one copy to the host reports ids that stand for nothing too.

    Args:
        input_ids: [B, S].
        mask: [B, S] bool, real tokens; what padding holds is not looked at.
        vocab_size: rows of the embeddings.

    Raises:
        ValueError: a real token is neither a marker nor in the vocabulary.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    is_odd = ((input_ids < 0) & ~is_image) | (input_ids >= vocab_size)
    markers, odd = torch.stack([(part & mask).sum(dim=1) for part in (is_image, is_odd)]).tolist()
    if any(odd):
        row = next(i for i, count in enumerate(odd) if count)
        found = input_ids[row][is_odd[row] & mask[row]].tolist()
        raise ValueError(
            f"input_ids of sample {row} hold {', '.join(map(str, found[:5]))}: expected ids from 0 to {vocab_size - 1} "
            f"(the model's vocabulary), or {IMAGE_TOKEN_INDEX} where an image goes"
        )
    return markers


def check_texts(texts: Any, count: int, of: str) -> None:
    """Raise ValueError unless `texts` are `count` strings, one for each `of` ("sample" or "image")."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts are {describe(texts)}: expected a list of strings, one for each {of}")
    if len(texts) != count:
        raise ValueError(f"{len(texts)} texts for {count} {of}s; give one text for each {of}")


def describe(value: Any) -> str:
    """What a value is, for a message: type, shape and device of a tensor, else its type and a little of it."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
