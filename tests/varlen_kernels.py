"""FlashAttention for rows of different lengths, by loops: what stands in for its kernels, which need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from llava.model.language_model import packed
from tests.pretend_device import kernel


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    scale: float | None,
    before: int,
) -> Tensor:
    """Causal attention inside each sample, whose last query is at its last key; all keys are seen or `before` + 1."""
    assert query.ndim == key.ndim == value.ndim == 3, "expected [tokens, heads, width]"
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert ends_q[0] == 0
    assert ends_q[-1] == len(query)
    assert query.shape[1] % key.shape[1] == 0
    outputs = []
    for i in range(len(ends_q) - 1):
        own, seen_by_own = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        q, k, v = (t.float().transpose(0, 1) for t in (query[own], key[seen_by_own], value[seen_by_own]))
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
        assert q.shape[1], "an empty sample"
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1]).unsqueeze(1) - torch.arange(k.shape[1])
        seen = (distance >= 0) & ((distance <= before) if before >= 0 else True)
        logits = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


@kernel
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """In place of `torch.nn.attention.varlen.varlen_attn`, with what it asks of its arguments."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0, "not causal"
    assert cu_seq_k is not None
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


@kernel
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """In place of flash-attn's function of this name."""
    assert causal or max_seqlen_q == 1
    assert not dropout_p
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0])


@kernel
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """In place of flash-attn's function of this name, for rows without padding."""
    assert causal or q.shape[1] == 1
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=softmax_scale)
    return output.transpose(1, 2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    put_loops(monkeypatch)


def put_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the loops in the place of torch's and of flash-attn's kernels."""

    def functions(*args: Any, **kwargs: Any) -> tuple:
        return flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input

    monkeypatch.setattr(packed, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "_lazy_imports", functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)


def set_attention(model: Any, name: str) -> None:
    """Like `set_attn_implementation`, without a look for the package."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "num_key_value_heads"):
            module.config._attn_implementation = name
