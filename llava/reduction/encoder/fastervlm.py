"""FasterVLM: keep the patches that CLS attends to most.

Paper: [CLS] Attention is All You Need for Training-Free Visual Token Pruning, https://arxiv.org/abs/2412.01818.
Shapes: N images, P patches, M kept tokens, C vision width, H heads.
"""

from __future__ import annotations

from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.registry import register
from llava.reduction.selection import take_sorted


@register("fastervlm")
class FasterVLM(EncoderReducer):
    """Keep the patches that CLS attends to most in the block whose output is selected, in raster order.

    Heads count alike. In a tower without CLS, patches rank by the mean attention that they receive.

    | point | paper | release |
    |---|---|---|
    | budget | a ratio | no default; here 64 |
    | several tiles | - | neither ends of rows nor unpadding; here as `mm_patch_merge_type` says |
    """

    ranks_frames = True

    tokens: Count = 64  # patches to keep

    @property
    def needs(self) -> Needs:
        return Needs(attention=("selected",))

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C]."""
        scores = vision.attention["selected"].mean(dim=1)
        return take_sorted(vision.features, scores.topk(min(self.tokens, scores.shape[1]), dim=1).indices)
