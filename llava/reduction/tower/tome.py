"""ToMe: merge the most similar tokens in every block of the vision tower.

Paper: Token Merging: Your ViT But Faster, https://arxiv.org/abs/2210.09461, section 3.
Shapes: N images, T tokens of an image (CLS first, where there is one), A of them at even places, B at odd ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import TowerReducer
from llava.reduction.options import Count, Natural
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product
from llava.reduction.tower.tokens import BlockTokens, Regrouping


@register("tome")
class ToMe(TowerReducer):
    """In each block the `per_block` most similar pairs of tokens become their mean, by the keys averaged over heads.

    Tokens at even places choose among those at odd ones; CLS takes part in nothing. At most half of the tokens can go
    in a block. What is left stands in the place of the odd token that others went into; the order is that of the
    merging, not of the picture.

    | point | paper | lightcompress |
    |---|---|---|
    | sizes | carried from block to block: the mean is that of all patches | forgotten: a merged token counts as one |
    | attention | log(size) added to the logits of the keys | plain |
    | schedule | constant, or linear over depth | the same numbers by other names; here `per_block` for both |
    """

    per_block: Natural | list[int] | None = None  # pairs a block; or [start, step]; or a longer list, one for each
    tokens: Count | None = None  # left at the end: the pairs are spread over the blocks, the larger numbers first
    variant: Literal["paper", "lightcompress"] = "paper"

    budget_conflicts = ("per_block",)

    def validate(self) -> None:
        super().validate()
        if (self.per_block is None) == (self.tokens is None):
            raise self.mistake("give it per_block, the pairs that merge in a block, or tokens, what is left at the end")
        if isinstance(self.per_block, list | tuple) and len(self.per_block) < 2:
            raise self.mistake(f"per_block={self.per_block!r}: expected a number, [start, step], or a number a block")

    @property
    def tracks_sizes(self) -> bool:
        return self.variant == "paper"

    @property
    def proportional(self) -> bool:
        return self.variant == "paper"

    def blocks(self, depth: int, selected: int) -> Sequence[int]:
        """All that lead to what is read."""
        return range(selected)

    def schedule(self, patches: int, selected: int) -> list[int]:
        """Pairs that merge in each block."""
        given = self.per_block
        if self.tokens is not None:
            return spread(patches, self.tokens, selected)
        if isinstance(given, list | tuple):
            if len(given) == 2:
                return [max(0, given[0] + block * given[1]) for block in range(selected)]
            return [max(0, pairs) for pairs in (*given, *[0] * selected)][:selected]
        return [given or 0] * selected

    def regroup(self, given: BlockTokens) -> Regrouping | None:
        pairs = self.schedule(given.patches, given.selected)[given.block]
        return merge_pairs(at_least_float32(given.keys).mean(dim=1), pairs, given.tokens.first)


def spread(patches: int, tokens: int, blocks: int) -> list[int]:
    """Pairs that merge in each block, so that `tokens` are left after the last: as even as halves allow."""
    pairs, left = [], patches
    for after in reversed(range(blocks)):
        even, least = -(-(left - tokens) // (after + 1)), left - tokens * 2**after
        pairs.append(min(max(even, least, 0), left // 2))
        left -= pairs[-1]
    return pairs


def merge_pairs(metric: Tensor, pairs: int, first: int) -> Regrouping | None:
    """Each token at an even place takes the most similar at an odd one; the `pairs` most similar of them merge.

    Args:
        metric: [N, T, any], float32 or wider, by whose cosine tokens are compared.
        pairs: how many; cut to half of the patches.
        first: 1 where the first token is CLS, which merges with nothing.
    """
    n, t, _ = metric.shape
    pairs = min(pairs, (t - first) // 2)
    if pairs <= 0:
        return None
    metric = normalize(metric, dim=2)
    similarity = precise_product(metric[:, ::2], metric[:, 1::2].transpose(1, 2))
    best, partner = similarity.max(dim=2)  # [N, A]
    best[:, :first] = float("-inf")
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, rest = order[:, :pairs], order[:, pairs:].sort(dim=1).values
    odd = torch.arange(t // 2, device=metric.device).expand(n, -1)
    kept = torch.cat([2 * rest, 2 * odd + 1], dim=1)
    place = torch.arange(kept.shape[1], device=metric.device).expand(n, -1)
    into = torch.empty(n, t, dtype=torch.int64, device=metric.device).scatter_(1, kept, place)
    into.scatter_(1, 2 * merged, rest.shape[1] + partner.gather(1, merged))
    return Regrouping(kept, into)
