"""HoloV: divide the budget among regions of the picture, and in each keep the patches that CLS attends to most.

Paper: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention,
https://arxiv.org/abs/2510.02912.
Shapes: N images, P patches, G regions, L patches of the largest region, M kept tokens, D language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count, Variant
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_rows
from llava.transfer import to_device

REGIONS = 16
TINY = 1e-6


@register("holov")
class HoloV(EncoderReducer):
    """Give each of 16 regions a share of the tokens by its attention and variety, and fill it by falling attention.

    A region is a run of patches in raster order. Its variety is how much the cosines among its projected patches vary.
    Tokens come region by region, in each by falling attention, and in raster order only where a region is kept whole.
    Without CLS, attention is the mean that patches receive.

    | point | paper | release |
    |---|---|---|
    | a share above a region's size | here the excess goes to the heaviest regions with room | zero tokens at the end |
    | budget | any | 64 in its LLaVA; here by default |
    | several tiles | - | joined to one sequence; here each by itself |
    """

    tokens: Count = 64  # that leave; zero tokens, whose `source` is -1, among them
    variant: Variant = "release"

    @property
    def needs(self) -> Needs:
        return Needs(attention=("selected",), projected=True)

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, D] projected patches to [N, M, D]."""
        if vision.projected is None:
            raise self.mistake("it compares projected patches: pass projected=")
        attention = at_least_float32(vision.attention["selected"]).mean(dim=1)
        count, device = min(self.tokens, attention.shape[1]), attention.device
        index, is_real = (to_device(part, device) for part in regions(attention.shape[1]))
        weights = region_weights(vision.projected.detach(), attention, index, is_real)
        sizes = is_real.sum(dim=1)
        kept = quotas(weights, sizes, count, hands_on=self.variant == "paper").unsqueeze(2)
        ranks = attention[:, index].masked_fill(kept == sizes.unsqueeze(1), 0).masked_fill(~is_real, -1)
        order = ranks.argsort(dim=2, descending=True, stable=True)
        source = index.expand_as(order).gather(2, order).flatten(1)
        slot = torch.arange(index.shape[1], device=device)
        is_taken = (slot < kept).flatten(1)
        first = is_taken.long().argsort(dim=1, descending=True, stable=True)[:, :count]
        source, is_taken = source.gather(1, first), is_taken.gather(1, first)
        tokens = take_rows(vision.projected, source) * is_taken.unsqueeze(2)
        return VisualTokens(tokens, source=source.masked_fill(~is_taken, -1))


def regions(patches: int) -> tuple[Tensor, Tensor]:
    """The patches of each region [G, L] int64, and which of these are real [G, L] bool; on the host."""
    parts = torch.arange(patches).tensor_split(min(REGIONS, patches))
    index = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    return index, torch.arange(index.shape[1]) < torch.tensor([len(part) for part in parts]).unsqueeze(1)


def region_weights(features: Tensor, attention: Tensor, index: Tensor, is_real: Tensor) -> Tensor:
    """The mean score of each region's patches, [N, G].

    Args:
        features: [N, P, D].
        attention: [N, P], float32 or wider.
        index: [G, L], the patches of each region.
        is_real: [G, L] bool.
    """
    n, (g, size) = len(features), index.shape
    unit = take_rows(features, index.flatten().expand(n, -1)).to(attention.dtype)
    unit = (unit / (unit.norm(dim=2, keepdim=True) + TINY)).view(n, g, size, -1)
    pair = is_real.unsqueeze(1) & is_real.unsqueeze(2)
    count = is_real.sum(dim=1).view(g, 1)
    others = (count - 1).clamp(min=1)
    cosine = precise_product(unit, unit.transpose(2, 3))
    cosine.masked_fill_(~pair | torch.eye(size, dtype=torch.bool, device=pair.device), 0)
    mean = cosine.sum(dim=3, keepdim=True) / others.unsqueeze(2)
    variance = (cosine - mean).square().masked_fill(~pair, 0).sum(dim=3) / others
    looked_at = 1000 * attention[:, index] * is_real
    scale = looked_at.sum(dim=2, keepdim=True) / count / (variance.sum(dim=2, keepdim=True) / count + TINY)
    return ((looked_at + 0.09 * variance * scale).sum(dim=2, keepdim=True) / count).squeeze(2)


def quotas(weights: Tensor, sizes: Tensor, count: int, hands_on: bool) -> Tensor:
    """How many of `count` tokens each region has, [N, G] int64, at most its size.

    Args:
        weights: [N, G].
        sizes: [G], patches of each region, `count` or more of them together.
        count: M.
        hands_on: whether what is too much for a region goes to others; otherwise it is lost.
    """
    share = (count * (weights / (weights.sum(dim=1, keepdim=True) + TINY))).floor().long()
    heaviest = weights.argsort(dim=1, descending=True, stable=True)
    spare = count - share.sum(dim=1, keepdim=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    share = share.scatter_add(1, heaviest, (rank < spare).long())
    quota = torch.minimum(share, sizes)
    if not hands_on:
        return quota
    room = (sizes - quota).gather(1, heaviest)
    excess = count - quota.sum(dim=1, keepdim=True)
    added = torch.minimum((excess - (room.cumsum(dim=1) - room)).clamp(min=0), room)
    return quota.scatter_add(1, heaviest, added)
