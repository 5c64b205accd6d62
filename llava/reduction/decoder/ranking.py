"""What decoder methods share: where they may drop, and attention as a score.

Shapes: B rows, L tokens a row, Q query tokens a row, H heads in K groups that share keys, D width, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.reduction.base import Drop, LayerInput
from llava.reduction.selection import precise_product


def check_drops(method: str, drops: list[Drop], num_layers: int) -> list[Drop]:
    """Return `drops`, or raise ValueError where one does not lie between two of `num_layers` layers."""
    outside = [drop.after for drop in drops if not 1 <= drop.after < num_layers]
    if outside:
        raise ValueError(
            f"method '{method}' drops tokens after layers {outside}, but this language model has {num_layers} layers: "
            f"choose from 1 to {num_layers - 1}"
        )
    return drops


def attention_from_queries(given: LayerInput) -> Tensor:
    """Attention that each token receives from the query tokens, averaged over heads and queries.

    Only the rows of the queries are computed, as the layer itself would: its normalisation, projections and rotary
    embedding, a softmax in float32 over the real tokens up to the query. Nothing is learnt through it.

    Returns:
        [B, L] float32; 0 for rows without a query.
    """
    with torch.no_grad():
        attention: Any = given.layer.self_attn
        normed: Any = given.layer.input_layernorm(given.hidden.detach())  # type: ignore[operator]
        cos, sin = (table.expand(len(normed), -1, -1) for table in given.position_embeddings)
        keys = _project(attention, "k", normed, cos, sin)
        queries = _project(attention, "q", *(_take(t, given.queries) for t in (normed, cos, sin)))

        b, h, q, d = queries.shape
        grouped = queries.reshape(b, keys.shape[1], -1, d)  # the heads of a group lie side by side: [B, K, H/K * Q, d]
        logits = precise_product(grouped, keys.transpose(-1, -2)).view(b, h, q, -1) * attention.scaling
        columns = torch.arange(logits.shape[-1], device=logits.device)
        visible = given.mask.unsqueeze(1) & (columns <= given.queries.unsqueeze(-1))  # [B, Q, L]
        lowest = torch.finfo(logits.dtype).min
        weights = logits.masked_fill(~visible.unsqueeze(1), lowest).softmax(dim=-1).mean(dim=1)
        asked = given.query_mask.unsqueeze(-1)
        return (weights * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)


def _take(values: Tensor, columns: Tensor) -> Tensor:
    """values[b, columns[b]]: [B, L, X] and [B, Q] give [B, Q, X]."""
    return values.gather(1, columns.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _project(attention: Any, kind: str, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") of all heads, rotated: [B, heads, L, d]."""
    flat = getattr(attention, f"{kind}_proj")(normed)
    heads = flat.view(*normed.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)  # Qwen3 normalises each head
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    return apply_rotary_pos_emb(heads, heads[:, :1], cos, sin)[0]  # it always rotates two tensors
