"""VisionZip: keep the patches that CLS attends to most, and merge the others into a few by key similarity.

Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models, https://arxiv.org/abs/2412.04467,
section 3.
Shapes: N images, P patches, R patches that are not dominant, K contextual tokens, C vision width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count, Variant
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_in_raster_order, take_rows


@register("visionzip")
class VisionZip(EncoderReducer):
    """Keep CLS and the `dominant` - 1 patches that it attends to most, then `contextual` tokens of all the others.

    Among the others, every s-th is a target, and each joins the target whose key is most like its own. Attention and
    keys are of the block whose output is selected. Without a class token `dominant` patches are kept, by the mean
    attention that they receive.

    | step | paper | release |
    |---|---|---|
    | contextual token | mean of target and members | the target plus the mean of its members: about twice the norm |
    | layer | the second last | block 22 of 24; here the block whose output is selected |
    | CLS | not a patch | the first visual token, and one of `dominant`; here in both |
    """

    dominant: Count | None = None  # tokens kept as they are, CLS among them; 54 by default
    contextual: Count | None = None  # tokens that all others become; 10 by default
    tokens: Count | None = None  # of both together, divided as in the paper: 54 of 64 are dominant
    variant: Variant = "release"

    def validate(self) -> None:
        super().validate()
        if self.tokens is not None and (self.dominant, self.contextual) != (None, None):
            raise self.mistake("tokens is dominant and contextual together; leave out the one or the others")
        if self.tokens == 1 or self.dominant == 1:
            raise self.mistake("dominant=1 would be CLS alone: give it 2 tokens or more")

    budget_conflicts = ("dominant", "contextual")

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        return super().budget_choices(entering)[1:]

    @property
    def needs(self) -> Needs:
        return Needs(attention=("selected",), keys="selected", cls=True)

    def parts(self) -> tuple[int, int]:
        """Dominant and contextual tokens."""
        if self.tokens is None:
            return self.dominant or 54, self.contextual or 10
        contextual = max(1, round(self.tokens * 10 / 64)) if self.tokens > 2 else 0
        return self.tokens - contextual, contextual

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, dominant + contextual, C]: CLS, dominant patches in raster order, contextual tokens."""
        n, p, _ = vision.features.shape
        dominant, contextual = self.parts()
        patches = min(dominant - (vision.cls is not None), p)
        best = vision.attention["selected"].sum(dim=1).topk(patches, dim=1).indices
        is_kept = torch.zeros(n, p, dtype=torch.bool, device=best.device).scatter_(1, best, True)
        kept = take_in_raster_order(vision.features, is_kept, [patches] * n)
        assert kept.source is not None
        parts, sources = [kept.features], [kept.source]
        if vision.cls is not None:
            parts.insert(0, vision.cls.unsqueeze(1))
            sources.insert(0, kept.source.new_full((n, 1), -1))
        contextual = min(contextual, p - patches)
        if contextual:
            parts.append(self._merge(vision, is_kept, p - patches, contextual))
            sources.append(kept.source.new_full((n, contextual), -1))
        return VisualTokens(torch.cat(parts, dim=1), source=torch.cat(sources, dim=1))

    def _merge(self, vision: VisionFeatures, is_kept: Tensor, count: int, contextual: int) -> Tensor:
        """The `count` patches that are not kept, as [N, K, C]."""
        assert vision.keys is not None
        p = vision.features.shape[1]
        others = (~is_kept).long().argsort(dim=1, descending=True, stable=True)[:, :count]
        keys = at_least_float32(vision.keys[:, vision.keys.shape[1] - p :])
        metric = normalize(take_rows(keys.unflatten(2, (vision.num_heads, -1)).mean(dim=2), others), dim=2)
        features = at_least_float32(take_rows(vision.features, others))
        step = max(1, count // contextual)
        columns = torch.arange(contextual, device=others.device)
        targets = columns * step
        nearest = precise_product(metric, metric[:, targets].transpose(1, 2)).argmax(dim=2)  # [N, R]
        member = (nearest.unsqueeze(2) == columns).to(features.dtype)
        member[:, targets] = 0
        sums, sizes = precise_product(member.transpose(1, 2), features), member.sum(dim=1).unsqueeze(2)
        target = features[:, targets]
        if self.variant == "paper":
            return ((target + sums) / (1 + sizes)).to(vision.features.dtype)
        return (target + sums / sizes.clamp(min=1)).to(vision.features.dtype)
