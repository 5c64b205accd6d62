"""Attention for packed rows: samples stand one after the other in one row, without padding, and don't see each other.

FlashAttention does this by itself from the samples' boundaries. `packed_sdpa` does it with torch's scaled dot product:
only attention sees padding; the rest of a layer runs on real tokens.

Shapes: T tokens of B samples in one row, L the longest sample, H heads, K heads of keys, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
BY_BOUNDARIES = ("flash_attention_2", "flash_attention_3")
CAN_PACK = (PACKED_SDPA, *BY_BOUNDARIES)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a packed row; without boundaries, transformers' sdpa.

    Args:
        query: [1, H, T, d]; key and value: [1, K, T, d].
        cu_seq_lens_q: [B + 1] int32, where samples begin, and T at the end.
        max_length_q: L.
        kwargs: those of transformers' attention functions.

    Returns:
        [1, T, H, d], and None for the attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    starts, ends = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    places = starts + torch.arange(max_length_q, device=query.device)  # [B, L]
    # Padding stands on the right and repeats the last token: what is real does not see it, attention being causal.
    unpack = torch.minimum(places, ends - 1).flatten()
    repack = torch.nonzero_static((places < ends).flatten(), size=query.shape[2])[:, 0]
    rows = [t[0].index_select(1, unpack).unflatten(1, places.shape).transpose(0, 1) for t in (query, key, value)]
    mask = _window_mask(max_length_q, kwargs.get("sliding_window"), query.device)
    output, _ = sdpa_attention_forward(module, *rows, mask, **kwargs)  # [B, L, H, d]
    return output.flatten(0, 1).index_select(0, repack).unsqueeze(0), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, L, L] bool, the `window` tokens up to each; None where that is all of them."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window)).view(1, 1, length, length)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
