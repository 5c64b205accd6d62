"""EViT: keep the patches that CLS attends to most, and fuse the others into one token, in a few blocks.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations,
https://arxiv.org/abs/2202.07800, section 3. Release: youweiliang/evit.
Shapes: N images, T tokens of an image (CLS first, where there is one), M of them after a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch

from llava.reduction.base import TowerReducer
from llava.reduction.options import Count, Fraction, Variant, Within
from llava.reduction.registry import register
from llava.reduction.tower.tokens import BlockTokens, Regrouping

BlockNumber = Annotated[int, Within(0)]


@register("evit")
class EViT(TowerReducer):
    """In each of a few blocks the share `keep` of the tokens stays, by the attention of CLS averaged over heads.

    With `fuse`, the sum of the others, each times its attention, becomes one more token at the end, an ordinary one in
    later blocks. A share of them all leaves everything as it is. `tokens` divides the way from all patches to that many
    into equal shares; the fused token is one of them.

    Paper and release lower `keep` from 1 by a cosine over the epochs of training. That is left out: a finetuning of
    one epoch trains with the share that is asked.

    | point | paper | release |
    |---|---|---|
    | order of what stays | not said; here that of the picture | by falling attention |
    | blocks | 4, 7, 10 of 12, counted from 1 | the same; here at 1/4, 2/4 and 3/4 of those that run |
    | tower | DeiT, LV-ViT | the same; none for CLIP |
    """

    blocks_: list[BlockNumber] | None = None  # numbers from 0; None: three (CLIP-L: 5, 11, 17)
    keep: Fraction | None = None  # of the tokens without CLS, in each of the blocks; None: 0.7, if `tokens` isn't given
    fuse: bool = True  # whether a token stands for those that go
    tokens: Count | None = None  # left at the end
    variant: Variant = "release"

    budget_conflicts = ("keep",)

    def validate(self) -> None:
        super().validate()
        if self.keep is not None and self.tokens is not None:
            raise self.mistake("keep and tokens both say how many tokens stay; leave one out")

    def blocks(self, depth: int, selected: int) -> Sequence[int]:
        if self.blocks_ is None:
            return sorted({selected * quarter // 4 for quarter in (1, 2, 3)} if selected else ())
        return self.chosen_blocks(self.blocks_, selected)

    def left(self, given: BlockTokens) -> int:
        """Tokens without CLS that leave the block, before the fused one is counted where it is on top of `keep`."""
        entered = given.tokens.features.shape[1] - given.tokens.first
        if self.tokens is None:
            return math.ceil((self.keep or 0.7) * entered)
        acts = self.blocks(given.selected, given.selected)
        step = (acts.index(given.block) + 1) / len(acts)
        return round(given.patches * min(1.0, self.tokens / given.patches) ** step)

    def regroup(self, given: BlockTokens) -> Regrouping | None:
        first, (n, t) = given.tokens.first, given.tokens.features.shape[:2]
        left = self.left(given)
        if left >= t - first:
            return None
        stay = left - int(self.fuse and self.tokens is not None)
        scores = given.cls_attention().mean(dim=1)
        order = first + scores[:, first:].argsort(dim=1, descending=True, stable=True)[:, :stay]
        if self.variant == "paper":
            order = order.sort(dim=1).values
        kept = torch.cat([torch.arange(first, device=order.device).expand(n, -1), order], dim=1)
        if not self.fuse:
            return Regrouping(kept)
        place = torch.arange(first + stay, device=order.device).expand(n, -1)
        into = torch.full((n, t), first + stay, device=order.device).scatter(1, kept, place)
        weights = scores.scatter(1, kept, 1.0)
        return Regrouping(torch.cat([kept, kept.new_full((n, 1), -1)], dim=1), into, weights)
