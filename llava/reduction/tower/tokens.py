"""What passes between the runner of the vision tower's blocks and a method that acts in them.

Shapes: N images, P patches, T tokens of an image (CLS first, where the tower has one), M tokens after a step, H heads
of d channels, C vision width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Regrouping:
    """What becomes of T tokens in a block: some stay, and others go into them.

    Attributes:
        kept: [N, M] int64, for each new token the old one in whose place it stands, CLS first where there is one; -1
            for a token that stands in nobody's place.
        into: [N, T] int64, for each old token the new one that it goes into, -1 for one that is dropped; None: the kept
            ones stay as they are, and all others are dropped.
        weights: [N, T] float, by which each old token enters the sum that the new one is; None: the mean by size.
        mask: [N, M] bool, real tokens, which come first, where images keep different numbers; None: all are.
    """

    kept: Tensor
    into: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class TowerTokens:
    """The tokens between two steps of the tower.

    Attributes:
        features: [N, T, C]; zero beyond an image's count.
        sizes: [N, T] float32, patches (or CLS) that went into each.
        source: [N, T] int64, the patch in whose place each stands; -1 for CLS, for what stands in nobody's place, and
            beyond the count.
        assignment: [N, P] int64, the token that each patch went into; -1: none.
        first: where the patches begin: 1 after CLS, otherwise 0.
        mask: [N, T] bool, real tokens, which come first; None: all are.
    """

    features: Tensor
    sizes: Tensor
    source: Tensor
    assignment: Tensor
    first: int
    mask: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor, first: int) -> TowerTokens:
        """The tokens that enter the tower, [N, T, C], each for itself."""
        n, t = features.shape[:2]
        source = torch.arange(-first, t - first, device=features.device).clamp(min=-1).expand(n, -1)
        assignment = torch.arange(first, t, device=features.device).expand(n, -1)
        return cls(features, features.new_ones(n, t, dtype=torch.float32), source, assignment, first)

    def regrouped(self, how: Regrouping) -> TowerTokens:
        """The tokens after a step."""
        real = how.kept >= 0 if how.mask is None else how.mask & (how.kept >= 0)
        old = how.kept.clamp(min=0)
        into = _places(old, real, self.features.shape[1]) if how.into is None else how.into
        if how.into is None:
            features = self.features.gather(1, _wide(old, self.features.shape[2]))
            sizes = self.sizes.gather(1, old)
        else:
            features, sizes = self._sums(into, how.weights, how.kept.shape[1])
        if how.mask is not None:
            features, sizes = features * how.mask.unsqueeze(-1), sizes * how.mask
        source = self.source.gather(1, old).masked_fill(~real, -1)
        went = into.gather(1, self.assignment.clamp(min=0)).masked_fill(self.assignment < 0, -1)
        return replace(self, features=features, sizes=sizes, source=source, assignment=went, mask=how.mask)

    def _sums(self, into: Tensor, weights: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """[N, M, C] features and [N, M] sizes of what goes into each new token, added up in float32 or float64."""
        is_in = into >= 0
        slot, sizes = into.clamp(min=0), self.sizes * is_in
        total = sizes.new_zeros(len(into), count).scatter_add(1, slot, sizes)
        share = sizes / total.gather(1, slot).clamp(min=1e-6) if weights is None else weights * is_in
        precise = torch.promote_types(self.features.dtype, torch.float32)
        parts = self.features.to(precise) * share.unsqueeze(-1)
        return add_up(parts, slot, count).to(self.features.dtype), total


@dataclass
class BlockTokens:
    """What a method sees of a block: its tokens after attention, and what attention was made of.

    Attributes:
        tokens: [N, T, C] with the attention's result added; what goes into the MLP.
        queries: [N, H, T, d].
        keys: [N, H, T, d], without the scale.
        values: [N, H, T, d].
        bias: [N, 1, 1, T] that was added to the logits, or None.
        scale: by which the logits are multiplied.
        block: its number, from 0.
        selected: how many blocks lead to what is read of the tower.
    """

    tokens: TowerTokens
    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    scale: float
    block: int
    selected: int

    @property
    def patches(self) -> int:
        """P, patches that entered the tower."""
        return self.tokens.assignment.shape[1]

    def cls_attention(self) -> Tensor:
        """Softmaxed attention of CLS to all tokens, [N, H, T] float32; without CLS, the mean of what all tokens pay."""
        queries = self.queries[:, :, :1] if self.tokens.first else self.queries
        with torch.autocast(queries.device.type, enabled=False):
            logits = queries.float() @ self.keys.float().transpose(-1, -2) * self.scale
        weights = (logits if self.bias is None else logits + self.bias.float()).softmax(dim=-1)
        if self.tokens.first or self.tokens.mask is None:
            return weights.mean(dim=2)
        asks = self.tokens.mask[:, None, :, None]
        return (weights * asks).sum(dim=2) / asks.sum(dim=2)


def add_up(values: Tensor, slot: Tensor, count: int) -> Tensor:
    """[N, T, C] values added up, in one order, into the `count` places that `slot` [N, T] names: [N, count, C]."""
    sums = values.new_zeros(len(values), count, values.shape[2])
    if values.device.type == "cpu":
        return sums.scatter_add(1, _wide(slot, values.shape[2]), values)
    # On a GPU scatter_add adds in any order, and rounds otherwise each time; this sorts first.
    row = torch.arange(len(values), device=values.device).unsqueeze(1).expand_as(slot)
    return sums.index_put((row, slot), values, accumulate=True)


def _wide(index: Tensor, width: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, width)


def _places(old: Tensor, real: Tensor, tokens: int) -> Tensor:
    """[N, T], the new place of each old token, -1 for those not among the `real` ones of `old` [N, M]."""
    n, m = old.shape
    places = torch.full((n, tokens + 1), -1, device=old.device)
    columns = torch.arange(m, device=old.device).expand(n, m)
    return places.scatter(1, old.masked_fill(~real, tokens), columns)[:, :tokens]
