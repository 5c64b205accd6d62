"""Attention of queries to patches, under the names that torch's `nn.MultiheadAttention` has for its weights.

Shapes: B any dimensions in front, Q queries, K keys, C width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

LEAST_HEAD = 8  # channels of a head, where the width is too small for the release's heads


class CrossAttention(nn.Module):
    """Multi-head attention whose last layer is called as a module, which ZeRO-3 gathers.

    Args:
        width: C.
        heads: H, which divides C.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, Q, C] from queries [B, Q, C], keys and values [B, K, C]; dimensions in front may be 1 in some."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(states, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        front = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        q, k, v = (states.expand(*front, *states.shape[-2:]) for states in (q, k, v))
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


def head_count(width: int, released: int) -> int:
    """The release's heads; of a narrower tower as many of at least `LEAST_HEAD` channels as divide its width."""
    most = max(1, min(released, width // LEAST_HEAD))
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)
