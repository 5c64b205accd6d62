"""VisPruner: keep the patches that CLS attends to most, and of the others those that are least alike.

Paper: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs,
https://arxiv.org/abs/2412.01818 (the later version).
Shapes: N images, P patches, R patches that are left, M kept tokens, C vision width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count, Share
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_rows, take_sorted

DROPPED = 8
"""At most so many patches go in a round."""


@register("vispruner")
class VisPruner(EncoderReducer):
    """Keep int(tokens * important_ratio) patches that CLS attends to most, then thin out the others round by round.

    In a round the others are dealt by turns into two halves, and of the first half the patches go that are most like
    one of the second. What is kept stays in raster order. Without CLS, patches rank by the mean attention that they
    receive. With `important_ratio: 1` it is FasterVLM; with 0 only the thinning out is left.

    | point | paper | release |
    |---|---|---|
    | order after a round | here as the release | the first half by falling similarity, then the second |
    | an odd number of others | works | crashes; here the first half has one more |
    | budget | any | no default; here 64 |
    | several tiles | - | no ends of rows, no unpadding; here as `mm_patch_merge_type` says |
    """

    ranks_frames = True

    tokens: Count = 64  # patches to keep
    important_ratio: Share = 0.5  # of them, those that CLS attends to most

    @property
    def needs(self) -> Needs:
        return Needs(attention=("selected",))

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C]."""
        ranked = vision.attention["selected"].mean(dim=1).argsort(dim=1, descending=True, stable=True)
        count = min(self.tokens, ranked.shape[1])
        important = int(count * self.important_ratio)
        rest, wanted = ranked[:, important:], count - important
        if 0 < wanted < rest.shape[1]:
            unit = normalize(at_least_float32(take_rows(vision.features.detach(), rest)), dim=2)
            rest = rest.gather(1, thin_out(precise_product(unit, unit.transpose(1, 2)), wanted))
        return take_sorted(vision.features, torch.cat([ranked[:, :important], rest[:, :wanted]], dim=1))


def thin_out(similarity: Tensor, wanted: int) -> Tensor:
    """[N, wanted] int64, which of R patches are left, by their similarity [N, R, R]; at least 1 is wanted."""
    n, r, _ = similarity.shape
    flat = similarity.flatten(1)
    left = torch.arange(r, device=similarity.device).expand(n, r)
    while left.shape[1] > wanted:
        first, second = left[:, ::2], left[:, 1::2]
        pairs = first.unsqueeze(2) * r + second.unsqueeze(1)
        nearest = flat.gather(1, pairs.flatten(1)).view(pairs.shape).amax(dim=2)
        dropped = min(DROPPED, left.shape[1] - wanted, first.shape[1])
        survivors = nearest.argsort(dim=1, descending=True, stable=True)[:, dropped:]
        left = torch.cat([first.gather(1, survivors), second], dim=1)
    return left
