"""Runs blocks of the vision tower with a method that acts between a block's attention and its MLP.

Shapes: N images, T tokens of an image (CLS first, where the tower has one), H heads of d channels, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from llava.reduction.base import TowerReducer
from llava.reduction.tower.tokens import BlockTokens, TowerTokens

_TAKES_BIAS = ("eager", "sdpa")  # attention functions whose mask may hold any number


def run_block(
    block: Any, tokens: TowerTokens, reducer: TowerReducer, number: int, selected: int, acts: bool = True
) -> TowerTokens:
    """One block of the tower.

    Args:
        block: transformers' encoder layer of CLIP or SigLIP.
        tokens: that enter it.
        reducer: the method.
        number: of the block, from 0.
        selected: how many blocks lead to what is read of the tower.
        acts: whether the method acts in this block; otherwise only its sizes and padding count.
    """
    if not acts and _bias(tokens, reducer.proportional) is None:
        return replace(tokens, features=block(tokens.features, None))
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return _run(block, tokens, reducer, number, selected, acts)

    def again(*given: Any) -> tuple[Any, ...]:  # tensors in and out, through which reentrant checkpoints can go back
        left = _run(block, _with_tensors(tokens, given), reducer, number, selected, acts)
        return _tensors_of(left)

    return _with_tensors(tokens, block._gradient_checkpointing_func(again, *_tensors_of(tokens)))


def _tensors_of(tokens: TowerTokens) -> tuple[Any, ...]:
    return tokens.features, tokens.sizes, tokens.source, tokens.assignment, tokens.mask


def _with_tensors(tokens: TowerTokens, tensors: Sequence[Any]) -> TowerTokens:
    features, sizes, source, assignment, mask = tensors
    return replace(tokens, features=features, sizes=sizes, source=source, assignment=assignment, mask=mask)


def _run(block: Any, tokens: TowerTokens, reducer: TowerReducer, number: int, selected: int, acts: bool) -> TowerTokens:
    bias = _bias(tokens, reducer.proportional)
    attention, normed = block.self_attn, block.layer_norm1(tokens.features)
    heads = (*normed.shape[:2], -1, attention.head_dim)
    queries, keys, values = (
        getattr(attention, f"{name}_proj")(normed).view(heads).transpose(1, 2) for name in ("q", "k", "v")
    )
    mixed = _attend(attention, queries, keys, values, bias)
    tokens = replace(tokens, features=tokens.features + attention.out_proj(mixed))
    if acts:
        given = BlockTokens(tokens, queries, keys, values, bias, attention.scale, number, selected)
        how = reducer.regroup(given)
        tokens = tokens if how is None else tokens.regrouped(how)
        if not reducer.tracks_sizes:
            tokens = replace(tokens, sizes=torch.ones_like(tokens.sizes))
    features = tokens.features + block.mlp(block.layer_norm2(tokens.features))
    return replace(tokens, features=features if tokens.mask is None else features * tokens.mask.unsqueeze(-1))


def _bias(tokens: TowerTokens, proportional: bool) -> Tensor | None:
    """What is added to the logits of each key, [N, 1, 1, T]: the lowest number at padding, log(size) where asked."""
    grown = proportional and tokens.features.shape[1] < tokens.assignment.shape[1] + tokens.first
    if tokens.mask is None and not grown:
        return None
    features = tokens.features
    bias = tokens.sizes.clamp(min=1e-6).log().to(features.dtype) if grown else features.new_zeros(features.shape[:2])
    if tokens.mask is not None:
        bias = bias.masked_fill(~tokens.mask, torch.finfo(features.dtype).min)
    return bias[:, None, None, :]


def _attend(attention: Any, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """[N, T, C], by the attention function of the tower's config, or by torch's where that takes no bias."""
    kind = attention.config._attn_implementation
    if bias is not None and kind not in _TAKES_BIAS:
        kind = "sdpa"
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    mixed, _ = function(attention, queries, keys, values, bias, scaling=attention.scale, dropout=dropout)
    return mixed.reshape(*mixed.shape[:2], -1).contiguous()
