"""DivPrune: keep the patches that are least alike.

Paper: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, https://arxiv.org/abs/2503.02175,
section 3.
Shapes: N images, P patches, M kept ones, D language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Fraction
from llava.reduction.registry import register
from llava.reduction.selection import BudgetedReducer, at_least_float32, precise_product, take_sorted


@register("divprune")
class DivPrune(BudgetedReducer):
    """Choose patches one by one, each the one whose least distance to those chosen before is greatest (max-min).

    Distance is 1 - cosine of the projected patches. The first is the patch whose nearest neighbour is farthest. The
    kept patches stay in raster order.

    | point | paper | release |
    |---|---|---|
    | budget | a ratio | round(0.098 P) by default, 56 of 576 patches; the default here too |
    """

    ranks_frames = True

    ratio: Fraction | None = None  # of the patches: round(P * ratio) are kept; 0.098 by default

    @property
    def needs(self) -> Needs:
        return Needs(projected=True)

    @property
    def is_adaptive(self) -> bool:
        return False

    def fixed_count(self, patches: int) -> int:
        if self.tokens is not None:
            return min(self.tokens, patches)
        return max(1, round(patches * (self.ratio or 0.098)))

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, D] projected patches to [N, M, D]."""
        if vision.projected is None:
            raise self.mistake("it compares projected patches: pass projected=")
        count = self.fixed_count(vision.projected.shape[1])
        return take_sorted(vision.projected, farthest_first(vision.projected.detach(), count))


def farthest_first(features: Tensor, count: int) -> Tensor:
    """[N, M] int64, `count` patches of [N, P, D] in the order of their choice."""
    unit = normalize(at_least_float32(features), dim=2)
    distance = 1 - precise_product(unit, unit.transpose(1, 2))
    others = distance + torch.diag(distance.new_full((features.shape[1],), float("inf")))
    chosen = [others.min(dim=2).values.argmax(dim=1)]
    least = torch.full_like(distance[:, 0], float("inf"))
    for _ in range(count - 1):
        row = distance.gather(1, chosen[-1].view(-1, 1, 1).expand(-1, 1, distance.shape[2])).squeeze(1)
        least = torch.minimum(least, row).scatter(1, chosen[-1].unsqueeze(1), float("-inf"))
        chosen.append(least.argmax(dim=1))
    return torch.stack(chosen, dim=1)
