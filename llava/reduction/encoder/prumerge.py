"""PruMerge: keep the patches that CLS attends to most, and merge into each its nearest neighbours.

Paper: LLaVA-PruMerge, https://arxiv.org/abs/2403.15388, sections 3.2 and 3.3.
Shapes: N images, P patches, M kept tokens, C vision width, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reduction.base import (
    EncoderReducer,
    Options,
    VisionFeatures,
    VisualTokens,
    check_choice,
    check_fraction,
)
from llava.reduction.registry import register
from llava.reduction.selection import nearest_neighbours, outlier_counts


@dataclass(kw_only=True)
class PruMergeOptions(Options):
    """Options of `prumerge`."""

    variant: str = "release"  # what the authors' code computes
    ratio: float | None = None  # fraction of the patches to keep; None: adaptive, the outliers of the attention
    neighbours: int = 32  # patches merged into each kept one

    def validate(self, method: str) -> None:
        check_choice(method, "variant", self.variant, ("release",))
        check_fraction(method, "ratio", self.ratio)
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"method '{method}': neighbours={self.neighbours!r} must be a whole number, 0 or more")


@register("prumerge")
class PruMerge(EncoderReducer):
    """Keep the patches whose CLS attention is an outlier, merge neighbours by key similarity, add one rest token.

    Attention is one softmax over CLS and patches at full width (one head, scale C^-0.5) in the last block. With
    `ratio` unset an image keeps as many patches as lie above Q3 + 1.5 IQR of its own attention; with `ratio`, the
    int(P * ratio) highest. To each kept patch the attention-weighted sum of its neighbours is added, and one token
    more holds the attention-weighted sum of all pruned patches. Order: by falling attention, the rest token last.

    An image without an outlier keeps its one highest patch (the release fails there).

    Args:
        options: see `PruMergeOptions`; default adaptive, release.
    """

    options_class = PruMergeOptions
    options: PruMergeOptions
    needs = frozenset({"keys", "cls_query"})

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, max M + 1, C]; `source` is the kept patch, -1 for the rest token."""
        attention, keys = cls_attention(vision)
        ranked, order = attention.sort(dim=1, descending=True, stable=True)
        counts = self._counts(ranked)
        kept = order[:, : int(counts.max())]
        return merge(vision.features, attention, keys, kept, counts, self.options.neighbours)

    def _counts(self, ranked: Tensor) -> Tensor:
        if self.options.ratio is None:
            return outlier_counts(ranked)
        n, p = ranked.shape
        return torch.full((n,), max(1, int(p * self.options.ratio)), device=ranked.device)


def cls_attention(vision: VisionFeatures) -> tuple[Tensor, Tensor]:
    """Attention that CLS pays the patches, all channels as one head.

    Returns:
        attention [N, P] float32, whose sum is below 1 by what CLS pays itself; keys of the patches [N, P, C].

    Raises:
        ValueError: the tower handed on no keys or queries, or has no CLS.
    """
    p, c = vision.features.shape[1:]
    if vision.keys is None or vision.queries is None:
        raise ValueError("prumerge reads the keys and the CLS query of the tower's last block; pass keys= and queries=")
    if vision.keys.shape[1] != p + 1:
        raise ValueError(
            f"prumerge ranks patches by the attention of CLS, and this vision tower has none: keys of shape "
            f"{tuple(vision.keys.shape)} for {p} patches. Use a CLIP tower, or a method that does without CLS"
        )
    logits = torch.einsum("nc,npc->np", vision.queries[:, 0], vision.keys) * c**-0.5
    return logits.softmax(dim=1, dtype=torch.float32)[:, 1:], vision.keys[:, 1:]


def merge(
    features: Tensor, attention: Tensor, keys: Tensor, kept: Tensor, counts: Tensor, neighbours: int
) -> VisualTokens:
    """Merge neighbours into the kept patches and append the rest token, as one product with a [M + 1, P] matrix.

    Args:
        features: [N, P, C] patches.
        attention: [N, P] float32 weights.
        keys: [N, P, C] keys that similarity is measured on.
        kept: [N, M] int64, kept patches, the first `counts` of each row real.
        counts: [N] int64, kept patches an image.
        neighbours: patches merged into each kept one.
    """
    n, m = kept.shape
    slot = torch.arange(m + 1, device=kept.device)
    real = slot < counts.unsqueeze(1)  # [N, M + 1]: this slot holds a kept patch
    weights = attention.new_zeros(n, m + 1, features.shape[1])
    nearest = nearest_neighbours(keys, kept, neighbours)
    weights[:, :m].scatter_(2, nearest, attention.unsqueeze(1).expand(-1, m, -1).gather(2, nearest))
    weights[:, :m].scatter_(2, kept.unsqueeze(-1), 1.0)
    weights.mul_(real.unsqueeze(-1))
    pruned = torch.ones_like(attention).scatter_add_(1, kept, -real[:, :m].to(attention.dtype))
    rest = counts.view(n, 1, 1).expand(-1, 1, weights.shape[2])
    weights.scatter_(1, rest, (attention * pruned).unsqueeze(1))
    source = torch.nn.functional.pad(kept, (0, 1), value=-1).masked_fill(~real, -1)
    return VisualTokens(weights.to(features.dtype) @ features, slot <= counts.unsqueeze(1), source)
