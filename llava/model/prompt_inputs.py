"""The ids of a batch with what goes along with them: wrong types, shapes and values are refused before they are used.

Shapes: B samples, S tokens a row of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.transfer import HostBatch

_WHOLE_NUMBERS = (torch.int64, torch.int32)


def check_prompt(input_ids: Any, attention_mask: Any = None, labels: Any = None) -> None:
    """Look at types, shapes and devices; values are not read, so that no device is waited for.

    Raises:
        ValueError: `input_ids` are no [B, S] tensor of whole numbers, or mask or labels do not go with them.
    """
    if not is_dense(input_ids) or input_ids.ndim != 2 or input_ids.dtype not in _WHOLE_NUMBERS or not len(input_ids):
        raise ValueError(
            f"input_ids are {describe(input_ids)}: expected a tensor [samples, tokens] of int64, e.g. "
            "tokenizer_image_token(prompt, tokenizer, return_tensors='pt').unsqueeze(0)"
        )
    if input_ids.shape[1] == 0:
        raise ValueError(f"input_ids are {describe(input_ids)}: expected at least one token")
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is None:
            continue
        if not is_dense(given) or given.shape != input_ids.shape or given.device != input_ids.device:
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


def check_host_batch(host: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
    """Raise ValueError unless `host` goes with the batch: by shapes, and by values where that waits for no device."""
    if not isinstance(host, HostBatch):
        raise ValueError(f"host is {describe(host)}: expected the HostBatch that the collator made, or None")
    advice = "leave host out where the batch was changed after the collator"
    shapes = {tuple(part.shape) for part in (host.input_ids, host.mask, host.labels) if part is not None}
    if shapes != {tuple(input_ids.shape)} or (host.labels is None) != (labels is None):
        raise ValueError(
            f"host has ids of shape {list(host.input_ids.shape)}, input_ids are of shape {list(input_ids.shape)}, and "
            f"mask and labels must be of that shape, labels in both or in none: {advice}"
        )
    if input_ids.device.type != "cpu":
        return
    mask = torch.ones_like(host.mask) if attention_mask is None else attention_mask.bool()
    pairs = {
        "input_ids": (host.input_ids, input_ids),
        "attention_mask": (host.mask, mask),
        "labels": (host.labels, labels),
    }
    for name, (known, given) in pairs.items():
        if known is not None and given is not None and not bool((known == given).all()):
            raise ValueError(f"host holds other {name} than the batch: {advice}")


@dataclass(frozen=True)
class Markers:
    """Where images and clips go.

    Attributes:
        images: image markers of each sample.
        clips: clip markers of each sample.
        is_clip: of each marker of the batch, row by row.
    """

    images: list[int]
    clips: list[int]
    is_clip: list[bool]

    @property
    def of_samples(self) -> list[int]:
        """Markers of either kind of each sample."""
        return [images + clips for images, clips in zip(self.images, self.clips, strict=True)]


def join_frame_markers(batch: HostBatch, frames: Sequence[int]) -> HostBatch:
    """The batch with one clip marker for each run of as many image markers as the next clip has frames.

    So Video-LLaVA's prompts mark a clip. The other markers of a run are taken out by the mask.

    Args:
        batch: of a prompt for a model with a video tower.
        frames: of each clip, in their order.
    """
    ids, mask, left = batch.input_ids.clone(), batch.mask.clone(), list(frames)
    is_image = (ids == IMAGE_TOKEN_INDEX) & mask
    starts = is_image & ~torch.cat([torch.zeros_like(is_image[:, :1]), is_image[:, :-1]], dim=1)
    for row, place in starts.nonzero().tolist():
        run = int(is_image[row, place:].long().cumprod(0).sum())
        while left and left[0] <= run:
            count = left.pop(0)
            ids[row, place] = VIDEO_TOKEN_INDEX
            mask[row, place + 1 : place + count] = False
            place, run = place + count, run - count
    return replace(batch, input_ids=ids, mask=mask)


def find_markers(batch: HostBatch, vocab_size: int) -> Markers:
    """The markers of a batch.

    Args:
        batch: what its padding holds is not looked at.
        vocab_size: rows of the embeddings.

    Raises:
        ValueError: a real token is neither a marker nor in the vocabulary, or a label is neither -100 nor in it.
    """
    checked = [("input_ids", batch.input_ids, IMAGE_TOKEN_INDEX, "an image goes")]
    if batch.labels is not None:
        checked.append(("labels", batch.labels, IGNORE_INDEX, "nothing is learnt"))
    is_image = (batch.input_ids == IMAGE_TOKEN_INDEX) & batch.mask
    is_clip = (batch.input_ids == VIDEO_TOKEN_INDEX) & batch.mask
    is_marker = is_image | is_clip
    # A label at a marker goes with it.
    odd = [((ids < 0) & (ids != mark) | (ids >= vocab_size)) & batch.mask & ~is_marker for _, ids, mark, _ in checked]
    images, clips, *counts = torch.stack([part.sum(dim=1) for part in (is_image, is_clip, *odd)]).tolist()
    for (name, ids, mark, meaning), where, count in zip(checked, odd, counts, strict=True):
        row = next((i for i, number in enumerate(count) if number), None)
        if row is not None:
            raise ValueError(
                f"{name} of sample {row} hold {', '.join(map(str, ids[row][where[row]].tolist()[:5]))}: expected ids "
                f"from 0 to {vocab_size - 1} (the model's vocabulary), or {mark} where {meaning}"
            )
    return Markers(images, clips, is_clip[is_marker].tolist())


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor that holds its elements one by one: not sparse, not on the meta device."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def check_cache(cache: Any) -> None:
    """Raise ValueError for what is no cache of transformers'."""
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is {describe(cache)}: expected the cache that an earlier call returned")


def check_call(cache: Any, images: Any, videos: Any, inputs_embeds: Any, packed: bool) -> bool:
    """Raise ValueError for arguments of `forward` that exclude each other.

    Returns:
        Whether the call goes on from what the cache holds.
    """
    check_cache(cache)
    cached = cache is not None and cache.get_seq_length() > 0
    named = "images" if images is not None else "videos"
    given = images is not None or videos is not None
    if cached and given:
        raise ValueError(f"{named} enter with the prompt: pass the whole prompt, without a cache that holds it already")
    if inputs_embeds is not None and given:
        raise ValueError(f"{named} enter with input_ids, where their markers stand: pass those, not inputs_embeds")
    if packed and cache is not None:
        raise ValueError("packed=True runs a batch for its loss and logits, without past_key_values")
    return cached


def check_texts(texts: Any, count: int, of: str) -> None:
    """Raise ValueError unless `texts` are `count` strings, one for each `of` ("sample" or "image")."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts are {describe(texts)}: expected a list of strings, one for each {of}")
    if len(texts) != count:
        raise ValueError(f"{len(texts)} texts for {count} {of}s; give one text for each {of}")


def describe(value: Any) -> str:
    """What a value is, for a message: type, shape and device of a tensor, otherwise its type and a little of it."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
