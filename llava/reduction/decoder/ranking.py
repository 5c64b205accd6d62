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
from llava.transfer import to_device


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

    Returns:
        [B, L] float32; 0 for rows without a query.
    """
    return mean_over_queries(attention_rows(given).mean(dim=1), given)


def mean_over_queries(rows: Tensor, given: LayerInput) -> Tensor:
    """[B, Q, L] as its mean over the real queries, [B, L]; 0 for rows without a query."""
    asked = given.query_mask.unsqueeze(-1)
    return (rows * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)


def attention_rows(given: LayerInput) -> Tensor:
    """Attention of the query tokens, head by head, [B, H, Q, L] float32.

    Only the rows of the queries are computed, as the layer itself would: its normalisation, projections and rotary
    embedding, a softmax in float32 over the real tokens up to the query. Nothing is learnt through it.
    """
    return _softmaxed(given, *_projected(given), slice(None))


def attention_of_heads(given: LayerInput, divisor: Tensor | None = None) -> Tensor:
    """Attention that each token receives, head by head, averaged over the queries.

    Rows of the batch go one after another, for many queries take memory.

    Args:
        given: see there.
        divisor: [B, Q, L], by which the attention is divided; 0 stays 0.

    Returns:
        [B, H, L] float32; 0 for rows without a query.
    """
    with torch.no_grad():
        queries, keys = _projected(given)
        means = []
        for row in range(len(queries)):
            part = slice(row, row + 1)
            attention = _softmaxed(given, queries, keys, part)
            if divisor is not None:
                attention = attention / divisor[part].unsqueeze(1)
            asked = given.query_mask[part, None, :, None]
            means.append((attention * asked).sum(dim=2) / asked.sum(dim=2).clamp(min=1))
        return torch.cat(means)


@torch.no_grad()
def _projected(given: LayerInput) -> tuple[Tensor, Tensor]:
    """Rotated queries of the tokens that rank [B, H, Q, d], and keys of all [B, K, L, d]."""
    normed, cos, sin = _normed(given)
    keys = _project(given.layer.self_attn, "k", normed, cos, sin)
    return _project(given.layer.self_attn, "q", *(_take(t, given.queries) for t in (normed, cos, sin))), keys


@torch.no_grad()
def _softmaxed(given: LayerInput, queries: Tensor, keys: Tensor, rows: slice) -> Tensor:
    """Attention of `queries` to `keys` in some rows of the batch, [B', H, Q, L]."""
    queries, keys = queries[rows], keys[rows]
    b, h, q, d = queries.shape
    grouped = queries.reshape(b, keys.shape[1], -1, d)  # the heads of a group lie side by side: [B, K, H/K * Q, d]
    scaling: Any = given.layer.self_attn.scaling  # type: ignore[union-attr]
    logits = precise_product(grouped, keys.transpose(-1, -2)).view(b, h, q, -1) * scaling
    columns = torch.arange(logits.shape[-1], device=logits.device)
    visible = given.mask[rows].unsqueeze(1) & (columns <= given.queries[rows].unsqueeze(-1))  # [B, Q, L]
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~visible.unsqueeze(1), lowest).softmax(dim=-1)


def rotated_keys(given: LayerInput) -> Tensor:
    """Keys of the layer with their rotary embedding, [B, K, L, d]. Nothing is learnt through it."""
    with torch.no_grad():
        return _project(given.layer.self_attn, "k", *_normed(given))


def pool_columns(given: LayerInput) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of each pool are, V the most of a pool.

    Returns:
        The row of each pool [P]; columns [P, V], 0 at padding; and [P, V] bool, what is no padding.
    """
    flat, device = given.pool.flatten(), given.pool.device
    starts = flat.numel() - int(given.present.sum()) + given.present.cumsum(0) - given.present
    slots = torch.arange(int(given.present.max()) if len(given.present) else 0)
    is_real = to_device(slots < given.present.unsqueeze(1), device)
    index = to_device((starts.unsqueeze(1) + slots).clamp(max=flat.numel() - 1), device)
    tokens = flat.argsort(stable=True)[index]  # -1 comes first, then pool after pool
    row = tokens[:, 0] // given.pool.shape[1]
    return row, (tokens % given.pool.shape[1]).masked_fill(~is_real, 0), is_real


def by_token(given: LayerInput, columns: tuple[Tensor, Tensor, Tensor], values: Tensor) -> Tensor:
    """Values [P, V] of the tokens of `pool_columns` at their places, [B, L]; 0 elsewhere."""
    row, column, is_real = columns
    b, length = given.mask.shape
    place = (row.unsqueeze(1) * length + column).masked_fill(~is_real, b * length)  # padding goes to a place of its own
    spread = values.new_zeros(b * length + 1).scatter(0, place.flatten(), values.flatten())
    return spread[:-1].view(b, length)


def _normed(given: LayerInput) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's input after its norm, [B, L, D], with cosine and sine of each token."""
    normed: Any = given.layer.input_layernorm(given.hidden.detach())  # type: ignore[operator]
    cos, sin = (table.expand(len(normed), -1, -1) for table in given.position_embeddings)
    return normed, cos, sin


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
