"""Attention for rows of different lengths: samples stand one after the other, and don't see each other.

Kernels of FlashAttention do this by themselves from the samples' boundaries: flash-attn's, where it is installed, or
torch's own, `packed_varlen`. `packed_sdpa` does it with torch's scaled dot product, on any device and in any type: only
attention sees padding; the rest of a layer runs on real tokens.

Shapes: T tokens of B samples in one row, L the longest sample, H heads, K heads of keys, d head width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.transfer import to_device

PACKED_SDPA, PACKED_VARLEN = "packed_sdpa", "packed_varlen"
BY_BOUNDARIES = ("flash_attention_2", "flash_attention_3", PACKED_VARLEN)
"""Attention that never looks at a mask where it is told the samples' boundaries."""
CAN_PACK = (PACKED_SDPA, *BY_BOUNDARIES)


def best_packed_attention(config: Any, *, is_16_bit: bool) -> str:
    """Which of torch's ways to take for packed rows: `packed_varlen` where it can run, otherwise `packed_sdpa`.

    Args:
        config: of the language model.
        is_16_bit: whether attention is computed in float16 or bfloat16.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = is_16_bit and width % 8 == 0 and width <= 256 and not getattr(config, "attention_dropout", 0.0)
    if not fits or not torch.cuda.is_available() or torch.version.cuda is None:
        return PACKED_SDPA
    is_known = {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys()
    return PACKED_VARLEN if is_known and torch.cuda.get_device_capability() >= (8, 0) else PACKED_SDPA


def boundaries(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Where samples begin and end, as transformers' attention functions are told; empty samples are left out."""
    lengths = [length for length in lengths if length]
    ends = to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def rows_for_sdpa(lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """What `packed_sdpa` needs besides: how a packed row becomes one padded row a sample, and back.

    Returns:
        `unpack_index` [B, L] int64 into the packed row, and `repack_index` [T] int64 into the padded ones.
    """
    length = torch.tensor([length for length in lengths if length]).unsqueeze(1)
    ends, column = length.cumsum(0), torch.arange(int(length.max()))
    # Padding stands on the right and repeats the last token: what is real does not see it, attention being causal.
    unpack = torch.minimum(ends - length + column, ends - 1)
    repack = (column < length).flatten().nonzero()[:, 0]
    return {"unpack_index": to_device(unpack, device), "repack_index": to_device(repack, device)}


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, L, L] bool, the `window` tokens up to each; None where that is all of them."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window)).view(1, 1, length, length)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    unpack_index: Tensor | None = None,
    repack_index: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a packed row; without the indices, transformers' sdpa.

    Args:
        query: [1, H, T, d]; key and value: [1, K, T, d].
        attention_mask: as `window_mask` makes it, for the padded rows.
        unpack_index: see `rows_for_sdpa`, `repack_index` too.
        kwargs: those of transformers' attention functions.

    Returns:
        [1, T, H, d], and None for the attention weights.
    """
    if unpack_index is None or repack_index is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    flat = unpack_index.flatten()
    shape = unpack_index.shape
    rows = [t[0].index_select(1, flat).unflatten(1, shape).transpose(0, 1) for t in (query, key, value)]
    output, _ = sdpa_attention_forward(module, *rows, attention_mask, **kwargs)  # [B, L, H, d]
    return output.flatten(0, 1).index_select(0, repack_index).unsqueeze(0), None


def packed_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample by torch's FlashAttention; without boundaries, transformers' sdpa.

    Args:
        query: [R, H, S, d] of R rows that lie one after the other; key and value: [R, K, S, d].
        attention_mask: not read where there are boundaries.
        cu_seq_lens_q: [B + 1] int32, where samples begin in the R * S tokens, and R * S at the end.
        max_length_q: L.
        dropout: must be 0 where there are boundaries.
        scaling: of the products of queries and keys.
        sliding_window: tokens that each one sees, itself included; None: all up to it.
        kwargs: those of transformers' attention functions.

    Returns:
        [R, S, H, d], and None for the attention weights.

    Raises:
        ValueError: dropout, which the kernel doesn't know.
    """
    if cu_seq_lens_q is None or max_length_q is None or max_length_k is None:
        kwargs = {**kwargs, "dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if dropout:
        raise ValueError(f"{PACKED_VARLEN} has no dropout: set attention_dropout to 0, or take {PACKED_SDPA}")
    dtype = get_target_dtype(query, module) or query.dtype  # under autocast, rotary embeddings are float32
    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))
    before = -1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


for _name, _function in ((PACKED_SDPA, packed_sdpa), (PACKED_VARLEN, packed_varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
