"""TRIM: keep the patches that stand out against the text, and append the mean of the others.

Paper: Less is More, https://arxiv.org/abs/2409.10994, section 3.2.
Shapes: N images, P patches, M kept tokens, C vision width, E width of CLIP's shared space.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llava.reduction.base import Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Variant
from llava.reduction.registry import register
from llava.reduction.selection import BudgetedReducer, on_host, precise_product, take_in_raster_order


@register("trim")
class Trim(BudgetedReducer):
    """Keep the patches whose score against the text is an outlier, in raster order, then the mean of the rest.

    Scores are a softmax over the patches, in CLIP's space of images and texts:

    - paper: of the cosine similarity.
    - release: of minus the plain dot product, so the patches least like the text are kept.

    An image keeps as many patches as lie above Q3 + 1.5 IQR of its own scores (one, where none does), or as the budget
    says. Where all are kept there is no rest, and nothing is appended.
    """

    ranks_frames = True

    variant: Variant = "release"
    text: Literal["question", "conversation"] = "question"  # what the patches are compared with

    @property
    def needs(self) -> Needs:
        return Needs(patch_embeds=True, text="pooled")

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C]; the last token of an image is the mean of the rest, its `source` -1."""
        scores = self.score(vision)
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        counts = self.kept_counts(ranked)
        lengths = on_host(counts, self.fixed_count(scores.shape[1]))
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        is_kept = rank < counts.unsqueeze(1)
        return append_mean(take_in_raster_order(vision.features, is_kept, lengths), vision.features, ~is_kept)

    def score(self, vision: VisionFeatures) -> Tensor:
        """How much each patch stands out, [N, P] float32."""
        if vision.patch_embeds is None or vision.text is None:
            raise ValueError(
                "trim compares patches with a text: pass patch_embeds= and text=, or call the model with texts=[...], "
                "one for each sample"
            )
        patches, text = vision.patch_embeds.float(), vision.text.float()
        product = precise_product(patches, text.unsqueeze(2)).squeeze(2)
        if self.variant == "release":
            return (-product).softmax(dim=1)
        lengths = patches.norm(dim=2) * text.norm(dim=1, keepdim=True)
        return (product / lengths.clamp(min=1e-12)).softmax(dim=1)


def append_mean(tokens: VisualTokens, features: Tensor, rest: Tensor) -> VisualTokens:
    """Append the mean of the patches in `rest` [N, P] bool to the tokens of each image that has any."""
    number = rest.sum(dim=1, keepdim=True)
    weights = rest.to(features.dtype) / number.clamp(min=1).to(features.dtype)
    mean = weights.unsqueeze(1) @ features  # [N, 1, C]
    counts = tokens.counts.unsqueeze(1)
    slot = torch.arange(tokens.features.shape[1] + 1, device=features.device)
    is_mean = (slot == counts) & (number > 0)
    padded = torch.nn.functional.pad(tokens.features, (0, 0, 0, 1))
    assert tokens.source is not None
    lengths = tokens.lengths
    return VisualTokens(
        torch.where(is_mean.unsqueeze(2), mean, padded),
        (slot < counts) | is_mean,
        torch.nn.functional.pad(tokens.source, (0, 1), value=-1),
        lengths=None if lengths is None else [kept + (kept < features.shape[1]) for kept in lengths],
    )
