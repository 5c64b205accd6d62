"""PruMerge: keep the patches that CLS attends to most, and merge into each its nearest neighbours.

Paper: LLaVA-PruMerge, https://arxiv.org/abs/2403.15388, sections 3.2 and 3.3.
Shapes: N images, P patches, M slots for kept patches, C vision width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.reduction.base import Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Natural, Variant
from llava.reduction.registry import register
from llava.reduction.selection import (
    BudgetedReducer,
    mean_attention,
    nearest_neighbours,
    on_host,
    take_in_raster_order,
)


@dataclass
class Selection:
    """Patches to keep.

    Attributes:
        kept: [N, M] int64, indices of patches; the first `counts` of each row are real.
        counts: [N] int64.
        lengths: `counts` on the host.
        repeated: [N, M] bool, slots whose patch stands in the row before; None: there are none.
    """

    kept: Tensor
    counts: Tensor
    lengths: list[int]
    repeated: Tensor | None = None

    def real(self) -> Tensor:
        """[N, M] bool, slots that hold a patch."""
        return torch.arange(self.kept.shape[1], device=self.kept.device) < self.counts.unsqueeze(1)

    def is_kept(self, patches: int) -> Tensor:
        """[N, P] bool, patches that some slot holds."""
        times = torch.zeros(len(self.kept), patches, dtype=torch.int64, device=self.kept.device)
        return times.scatter_add_(1, self.kept, self.real().long()) > 0


@register("prumerge")
class PruMerge(BudgetedReducer):
    """Keep the patches whose CLS attention is an outlier, and merge into each its neighbours by key similarity.

    An image keeps as many patches as lie above Q3 + 1.5 IQR of its own attention (one, where none does), or as the
    budget says, by falling attention.

    - release: attention is one softmax at full width, as if CLIP had one head. To each kept patch the
      attention-weighted sum of its neighbours among all other patches is added, and one token more, the last, holds
      the attention-weighted sum of all pruned patches.
    - paper: attention is the mean over heads. Each kept patch becomes the attention-weighted sum of its neighbours
      among the pruned patches (itself, where nothing was pruned); no further token.

    With neighbours=0 nothing is merged or appended, and the kept patches stay in raster order.
    """

    ranks_frames = True

    variant: Variant = "release"
    neighbours: Natural = 32  # patches merged into each kept one; 0 prunes only
    attention: Literal["cls", "received"] = "cls"  # what CLS pays a patch, or the mean of what all pay it

    @property
    def needs(self) -> Needs:
        return Needs(keys="last", cls_query="last") if self.attention == "cls" else Needs(keys="last", queries="last")

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C], with a token more where one is appended; its `source` is -1."""
        vision = self.measured(vision)
        attention, keys = vision.attention["last"][:, 0], vision.keys
        assert keys is not None
        selection = self.select(attention)
        if self.neighbours == 0:
            lengths = selection.lengths if selection.repeated is None else None
            return take_in_raster_order(vision.features, selection.is_kept(attention.shape[1]), lengths)
        merge = merge_release if self.variant == "release" else merge_paper
        return merge(vision.features, attention, keys, selection, self.neighbours)

    def measured(self, vision: VisionFeatures) -> VisionFeatures:
        if "last" in vision.attention:
            return vision
        score = cls_attention if self.attention == "cls" else received_attention
        attention, keys = score(vision, 1 if self.variant == "release" else vision.num_heads)
        return replace(vision, attention={"last": attention.unsqueeze(1)}, keys=keys, queries=None)

    def select(self, attention: Tensor) -> Selection:
        """The patches to keep, for attention [N, P]."""
        ranked, order = attention.sort(dim=1, descending=True, stable=True)
        counts = self.kept_counts(ranked)
        lengths = on_host(counts, self.fixed_count(attention.shape[1]))
        return Selection(order[:, : max(lengths)], counts, lengths)


def cls_attention(vision: VisionFeatures, heads: int) -> tuple[Tensor, Tensor]:
    """Attention that CLS pays the patches, the mean over heads.

    Args:
        vision: with keys and queries.
        heads: into which the channels are divided.

    Returns:
        attention [N, P] float32, whose sum is below 1 by what CLS pays itself; keys of the patches [N, P, C].

    Raises:
        ValueError: the tower handed on no keys or queries, or has no CLS.
    """
    p = vision.features.shape[1]
    queries, keys = _projections(vision)
    if keys.shape[1] != p + 1:
        raise ValueError(
            f"prumerge ranks patches by the attention of CLS, and this vision tower has none: keys of shape "
            f"{tuple(keys.shape)} for {p} patches. Use a CLIP tower, or the option attention=received"
        )
    return mean_attention(queries[:, :1], keys, heads).mean(dim=1)[:, 1:], keys[:, 1:]


def received_attention(vision: VisionFeatures, heads: int) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives, the mean over all queries and heads; results as for `cls_attention`.

    Raises:
        ValueError: the tower handed on no keys or not all queries.
    """
    queries, keys = _projections(vision)
    if queries.shape != keys.shape:
        raise ValueError(f"attention=received needs all queries: {tuple(queries.shape)} for keys {tuple(keys.shape)}")
    first = keys.shape[1] - vision.features.shape[1]  # 1 where there is a CLS
    return mean_attention(queries, keys, heads).mean(dim=1)[:, first:], keys[:, first:]


def _projections(vision: VisionFeatures) -> tuple[Tensor, Tensor]:
    if vision.keys is None or vision.queries is None:
        raise ValueError("prumerge reads keys and queries of the tower's last block; pass keys= and queries=")
    return vision.queries, vision.keys


def merge_release(
    features: Tensor, attention: Tensor, keys: Tensor, selection: Selection, neighbours: int
) -> VisualTokens:
    """Add to each kept patch its neighbours and append the sum of the pruned: one product with [N, M + 1, P].

    Args:
        features: [N, P, C] patches.
        attention: [N, P] float32 weights.
        keys: [N, P, C] keys that similarity is measured on.
        selection: the kept patches.
        neighbours: patches merged into each kept one.
    """
    kept, real = selection.kept, pad(selection.real(), (0, 1))
    pruned, dropped = _pruned(attention, selection)
    nearest, is_neighbour = nearest_neighbours(keys, kept, neighbours, dropped, selection.repeated)
    weights = _neighbour_weights(attention, nearest, is_neighbour, rows=kept.shape[1] + 1)
    weights[:, :-1].scatter_add_(2, kept.unsqueeze(-1), torch.ones_like(weights[:, :-1, :1]))
    weights.mul_(real.unsqueeze(-1))
    last = selection.counts.view(-1, 1, 1).expand(-1, 1, weights.shape[2])
    weights.scatter_(1, last, (attention * pruned).unsqueeze(1))
    source = pad(kept, (0, 1)).masked_fill(~real, -1)
    mask = torch.arange(kept.shape[1] + 1, device=kept.device) <= selection.counts.unsqueeze(1)
    lengths = [kept + 1 for kept in selection.lengths]
    return VisualTokens(weights.to(features.dtype) @ features, mask, source, lengths=lengths)


def merge_paper(
    features: Tensor, attention: Tensor, keys: Tensor, selection: Selection, neighbours: int
) -> VisualTokens:
    """Replace each kept patch by the sum of its neighbours among the pruned; arguments as for `merge_release`."""
    kept, real = selection.kept, selection.real()
    pruned, _ = _pruned(attention, selection)
    nearest, is_neighbour = nearest_neighbours(keys, kept, neighbours, excluded=~pruned)
    weights = _neighbour_weights(attention, nearest, is_neighbour, rows=kept.shape[1])
    alone = ~is_neighbour.any(dim=2, keepdim=True)
    weights.scatter_add_(2, kept.unsqueeze(-1), alone.to(weights.dtype)).mul_(real.unsqueeze(-1))
    source = kept.masked_fill(~real, -1)
    return VisualTokens(weights.to(features.dtype) @ features, real, source, lengths=selection.lengths)


def _neighbour_weights(attention: Tensor, nearest: Tensor, is_neighbour: Tensor, rows: int) -> Tensor:
    """[N, rows, P]: the attention to each slot's neighbours, added up where a patch is one twice."""
    n, m, _ = nearest.shape
    weights = attention.new_zeros(n, rows, attention.shape[1])
    values = attention.unsqueeze(1).expand(-1, m, -1).gather(2, nearest) * is_neighbour
    weights[:, :m].scatter_add_(2, nearest, values)
    return weights


def _pruned(attention: Tensor, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Patches whose attention the rest token sums [N, P] bool, and those that are neither kept nor pruned.

    The release takes the complement by dropping as many patches as there are slots, repeated ones included, from a
    list where the kept stand first: for each repetition, one patch too many, from the top left on.
    """
    is_kept = selection.is_kept(attention.shape[1])
    if selection.repeated is None:
        return ~is_kept, None
    number = (~is_kept).cumsum(dim=1)  # of the patches that are not kept, 1, 2, ...
    dropped = ~is_kept & (number <= selection.repeated.sum(dim=1, keepdim=True))
    return ~is_kept & ~dropped, dropped
