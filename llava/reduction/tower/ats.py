"""ATS: sample tokens by their scores, as many as the picture asks for, in every block from a quarter of them on.

Paper: Adaptive Token Sampling For Efficient Vision Transformers, https://arxiv.org/abs/2111.15667, section 3.
Release: adaptivetokensampling/ATS.
Shapes: N images, L tokens of an image without CLS, K points of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from llava.reduction.base import TowerReducer
from llava.reduction.options import Count, Variant, Within
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32
from llava.reduction.tower.tokens import BlockTokens, Regrouping

BlockNumber = Annotated[int, Within(0)]


@register("ats")
class ATS(TowerReducer):
    """In each block the tokens nearest to even points of the scores' running sum stay, each once.

    A token's score is the attention of CLS to it, summed over heads, times the length of its value. Where few tokens
    have most of the score, many points fall on the same ones, and fewer stay: pictures keep different numbers. There
    are as many points as patches, or `at_most`. What stays is in the order of rising scores.

    The device is waited for once in each of the blocks, since a count becomes a shape.

    | point | paper | release |
    |---|---|---|
    | order of the running sum | that of the picture | rising scores |
    | points of sampling | (2i - 1) / 2K | K even ones from the lowest sum above 0 to 1, both ends in |
    | fewer points than patches | any number | crashes; here any number |
    | other pictures | none has an influence | padding does: the lowest token may stay; here none has |
    | attention | softmax | (e + 1e-6 / T) / (sum + 1e-6), below 1e-6 off; here softmax |
    """

    blocks_: list[BlockNumber] | None = None  # numbers from 0; None: all from a quarter of those that run (CLIP-L: 5)
    at_most: Count | None = None  # points of sampling, and so the most tokens that stay; None: as many as patches
    variant: Variant = "release"

    @property
    def is_adaptive(self) -> bool:
        return True

    def blocks(self, depth: int, selected: int) -> Sequence[int]:
        if self.blocks_ is None:
            return range(selected // 4, selected)
        return self.chosen_blocks(self.blocks_, selected)

    def regroup(self, given: BlockTokens) -> Regrouping:
        tokens, first = given.tokens, given.tokens.first
        attention = given.cls_attention().sum(dim=1)[:, first:]
        lengths = torch.linalg.vector_norm(at_least_float32(given.values), dim=(1, 3))[:, first:]
        scores = attention * lengths
        real = torch.ones_like(scores, dtype=torch.bool) if tokens.mask is None else tokens.mask[:, first:]
        # Without a sum of the scores: what follows scales the running one to end at 1.
        keys = scores if self.variant == "release" else torch.zeros_like(scores)
        order = keys.masked_fill(~real, float("inf")).argsort(dim=1, stable=True)
        sums = (scores * real).gather(1, order).cumsum(dim=1)
        real = real.gather(1, order)
        points = min(self.at_most or given.patches, given.patches)
        sampled = sample(sums, real, points, shifted=self.variant == "release")
        return _gathered(first, order, sampled)


def sample(sums: Tensor, real: Tensor, points: int, shifted: bool) -> Tensor:
    """[N, L] bool, the tokens nearest to even points of their running sums; of several as near, the first.

    Args:
        sums: [N, L] float, never falling.
        real: [N, L] bool, real tokens, which come first.
        points: K.
        shifted: whether sums begin at 0 and points at the lowest sum above it; otherwise the middles of equal parts.
    """
    low = sums[:, :1] if shifted else torch.zeros_like(sums[:, :1])
    cdf = (sums - low) / (sums[:, -1:] - low).clamp(min=torch.finfo(sums.dtype).tiny)
    if shifted:
        start = cdf.masked_fill(cdf <= 0, 1.0).amin(dim=1, keepdim=True)
        steps = torch.arange(points - 1, -1, -1, device=sums.device, dtype=sums.dtype) / max(points - 1, 1)
        at = 1 - (1 - start) * steps
    else:
        middles = (2 * torch.arange(points, device=sums.device, dtype=sums.dtype) + 1) / (2 * points)
        at = middles.expand(len(sums), -1)
    cdf = cdf.masked_fill(~real, float("inf"))
    above = torch.searchsorted(cdf, at.contiguous()).clamp(max=cdf.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    is_below = at - cdf.gather(1, below) <= cdf.gather(1, above) - at
    value = cdf.gather(1, torch.where(is_below, below, above))
    return torch.zeros_like(real).scatter(1, torch.searchsorted(cdf, value), True)


def _gathered(first: int, order: Tensor, sampled: Tensor) -> Regrouping:
    """CLS and the sampled tokens, in their order; shorter rows are padded."""
    counts = sampled.sum(dim=1)
    most, least = torch.stack([counts.max(), counts.min()]).tolist()
    place = sampled.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    cls = torch.arange(first, device=order.device).expand(len(order), -1)
    kept = torch.cat([cls, first + order.gather(1, place)], dim=1)
    if most == least:
        return Regrouping(kept)
    mask = torch.arange(first + most, device=order.device) < first + counts.unsqueeze(1)
    return Regrouping(kept, mask=mask)
