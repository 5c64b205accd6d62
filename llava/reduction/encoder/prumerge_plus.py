"""PruMerge+: PruMerge's patches, and as many more spread evenly over the image.

Paper: LLaVA-PruMerge, https://arxiv.org/abs/2403.15388, section 3.4 and appendix 7.1.
Shapes: N images, P patches, M slots for kept patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava.reduction.encoder.prumerge import PruMerge, Selection
from llava.reduction.registry import register
from llava.reduction.selection import on_host


@register("prumerge_plus")
class PruMergePlus(PruMerge):
    """PruMerge with spatially uniform patches added at the ratio of the outliers; merging as in PruMerge.

    - release, adaptive: with m outliers, every s-th patch is added, s = max(1, (P // m) // 3), where it is not kept
      already: up to three times as many.
    - release, fixed budget: every s-th patch from s // 2 on, s = int(1 / ratio), is added even where it is kept
      already. Such a patch enters twice.
    - paper: as many patches as there are outliers, spread evenly over those that are not.

    The budget counts the outliers; about twice as many tokens come out.
    """

    def select(self, attention: Tensor) -> Selection:
        """The patches to keep, for attention [N, P]: the outliers, then those added in raster order."""
        ranked, order = attention.sort(dim=1, descending=True, stable=True)
        counts = self.kept_counts(ranked)
        p = attention.shape[1]
        fixed = self.fixed_count(p)
        if self.variant == "paper":
            return _append(order, counts, _even_rest, None if fixed is None else fixed + min(fixed, p - fixed))
        if fixed is None:
            return _append(order, counts, _stepped)
        return _append_repeating(order, fixed, self._step(p))

    def _step(self, patches: int) -> int:
        """Distance of the added patches under a fixed budget."""
        if self.ratio is not None:
            return int(1 / self.ratio)
        return max(1, patches // (self.tokens or patches))


def _append(
    order: Tensor, counts: Tensor, choose: Callable[[Tensor, Tensor], Tensor], fixed: int | None = None
) -> Selection:
    """The first `counts` of each row of `order` [N, P], then in raster order those that `choose` picks of the rest.

    `fixed`: how many patches that makes, where it does not depend on the image.
    """
    n, p = order.shape
    patch = torch.arange(p, device=order.device).expand(n, p)
    rank = torch.empty_like(order).scatter_(1, order, patch)
    is_kept = rank < counts.unsqueeze(1)
    added = choose(is_kept, counts.unsqueeze(1)) & ~is_kept
    position = torch.where(is_kept, rank, torch.where(added, p + patch, 2 * p))
    total = (is_kept | added).sum(dim=1)
    lengths = on_host(total, fixed)
    return Selection(position.argsort(dim=1)[:, : max(lengths)], total, lengths)


def _stepped(is_kept: Tensor, counts: Tensor) -> Tensor:
    """Every s-th patch but the last one, [N, P] bool; `counts` [N, 1] outliers."""
    p = is_kept.shape[1]
    patch = torch.arange(p, device=is_kept.device)
    step = (p // counts // 3).clamp(min=1)
    return (patch % step == 0) & (patch < p - 1)


def _even_rest(is_kept: Tensor, counts: Tensor) -> Tensor:
    """As many patches as `counts` [N, 1], the middles of equal parts of those that are not kept; [N, P] bool."""
    rest = (~is_kept).cumsum(dim=1)
    length = rest[:, -1:]
    wanted = torch.minimum(counts, length)

    def parts(upto: Tensor) -> Tensor:
        """How many of the middles (2 i + 1) length / (2 wanted) lie below `upto`, in whole numbers."""
        return ((2 * wanted * upto - 1).div(length.clamp(min=1), rounding_mode="floor") + 1) // 2

    return ~is_kept & (parts(rest) > parts(rest - 1))


def _append_repeating(order: Tensor, count: int, step: int) -> Selection:
    """The first `count` of each row of `order` [N, P], then every `step`-th patch, kept before or not."""
    n, p = order.shape
    patch = torch.arange(p, device=order.device).expand(n, p)
    rank = torch.empty_like(order).scatter_(1, order, patch)
    added = patch[:, step // 2 : p - 1 : step]
    kept = torch.cat([order[:, :count], added], dim=1)
    repeated = torch.zeros_like(kept, dtype=torch.bool)
    repeated[:, count:] = rank.gather(1, added) < count
    m = kept.shape[1]
    return Selection(kept, torch.full((n,), m, device=kept.device), [m] * n, repeated)
