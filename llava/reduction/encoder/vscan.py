"""VScan: keep patches that CLS attends to in the whole picture and in each part of it, and merge the others into them.

Paper: VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models,
https://arxiv.org/abs/2505.22654. Its second half, inside the language model, is `vscan_drop`.
Shapes: N images, P patches, M kept ones, D language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import EncoderReducer, Needs, Place, VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_in_raster_order

SIDE = 4  # windows a side of the picture


@register("vscan")
class VScan(EncoderReducer):
    """Half of the tokens are local, half global; every other patch is merged into the one that it is most like.

    Local: in each of 4 x 4 windows, as many patches as all windows can have alike, by the attention of CLS in an early
    block. Global: of the others, those that CLS attends to most in the block whose output is selected. Attention is
    the mean over heads. After the projector each other patch goes to the kept one of highest cosine, and a kept one
    becomes the mean of itself and its members. Kept patches stay in raster order. Without a class token attention is
    the mean that a patch receives.

    | point | release | here |
    |---|---|---|
    | grid | 24 x 24, windows of 6 x 6 | any: windows of nearly equal sides, fewer where there are fewer patches |
    | local block | 5 of 24 | block 5 of 24, at other depths the one as far up; or `local_block` |
    | number | fewer than `tokens` where it is no multiple of 32: int(tokens / 2) is divided by 16 windows | the same |
    | several tiles | `spatial_unpad` is refused | each by itself, laid out like those of other methods |
    """

    tokens: Count = 96  # local and global ones together
    local_block: int | None = None  # of the tower, from 0, or from -1 for the last

    @property
    def needs(self) -> Needs:
        return Needs(attention=(self._local, "selected"), projected=True, grid=True)

    @property
    def _local(self) -> Place:
        return "early" if self.local_block is None else self.local_block

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, D] projected patches to [N, M, D]."""
        if vision.projected is None or vision.grid is None:
            raise self.mistake("it merges projected patches by windows of their grid: pass projected= and grid=")
        is_kept, count = self.select(vision, vision.grid)
        kept = take_in_raster_order(vision.projected, is_kept, [count] * len(is_kept))
        assert kept.source is not None
        kept.features, kept.assignment = merge_alike(vision.projected, is_kept, kept.source)
        return kept

    @torch.no_grad()
    def select(self, vision: VisionFeatures, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """[N, P] bool, the patches that are kept, and how many they are."""
        local, overall = (vision.attention[place].mean(dim=1) for place in (self._local, "selected"))
        window, sizes = windows(grid, local.device)
        each = self.tokens // 2 // len(sizes)
        is_kept = rank_within(local, window, sizes) < sizes.clamp(max=each)[window]
        chosen = int(windows(grid)[1].clamp(max=each).sum())  # counted on the host
        more = min(self.tokens - self.tokens // 2, is_kept.shape[1] - chosen)
        if more:
            best = overall.masked_fill(is_kept, -1).topk(more, dim=1).indices
            is_kept = is_kept.scatter(1, best, True)
        return is_kept, chosen + more


def windows(grid: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The window of each patch [P] int64 in raster order, and the patches of each window [W] int64."""
    sides = [min(SIDE, cells) for cells in grid]
    row, column = (torch.arange(n, device=device) * side // n for n, side in zip(grid, sides, strict=True))
    window = (row.unsqueeze(1) * sides[1] + column).flatten()
    return window, (window == torch.arange(sides[0] * sides[1], device=device).unsqueeze(1)).sum(dim=1)


def rank_within(scores: Tensor, window: Tensor, sizes: Tensor) -> Tensor:
    """[N, P] int64, how many patches of its window come before each, by falling score.

    Args:
        scores: [N, P].
        window: [P] int64, of each patch.
        sizes: [W] int64, patches of each window.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, window[order].argsort(dim=1, stable=True))  # window after window
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    place = torch.empty_like(order).scatter_(1, order, places)
    return place - (sizes.cumsum(0) - sizes)[window]


def merge_alike(features: Tensor, is_kept: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Each kept patch as the mean of itself and of the others that are most like it, [N, M, D].

    Args:
        features: [N, P, D].
        is_kept: [N, P] bool.
        kept: [N, M] int64, the same patches.

    Returns:
        The means, and the token [N, P] int64 that each patch went into.
    """
    values = at_least_float32(features)
    unit = normalize(values.detach(), dim=2)
    centres = unit.gather(1, kept.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    nearest = precise_product(unit, centres.transpose(1, 2)).argmax(dim=2)
    into = torch.where(is_kept, is_kept.long().cumsum(dim=1) - 1, nearest)
    member = values.new_zeros(*into.shape, kept.shape[1]).scatter_(2, into.unsqueeze(2), 1).transpose(1, 2)
    means = precise_product(member, values) / member.sum(dim=2, keepdim=True)
    return means.to(features.dtype), into
