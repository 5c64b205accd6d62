"""DART: keep the image tokens that repeat a few pivots least.

Paper: Stop Looking for "Important Tokens" in Multimodal Language Models: Duplication Matters More,
https://arxiv.org/abs/2502.11494, section 4.
Shapes: B rows, L tokens a row, P pools of image tokens, V tokens of a pool at most, K pivots of a pool, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.reduction.base import DecoderReducer, Drop, LayerInput
from llava.reduction.decoder.ranking import by_token, check_drops, pool_columns, rotated_keys
from llava.reduction.options import Count, Share, Variant
from llava.reduction.registry import register
from llava.reduction.selection import precise_product
from llava.transfer import to_device

CHOSEN, LEAST = 4.0, -4.0  # above and below every cosine


@register("dart")
class Dart(DecoderReducer):
    """After an early layer, keep pivots, and for each pivot the image tokens with the least cosine to it.

    Pivots are the image tokens and the text tokens after the image whose keys in the last layer that ran have the
    greatest L1 norm. One after another takes as many tokens as all others, compared after the language model's last
    norm; what is taken is no longer there for the next. Image pivots always stay. No attention is computed. With fewer
    text tokens than pivots, or a batch whose answers are learnt (which are no pivots), the other pivots take more.

    | point | paper | release |
    |---|---|---|
    | budget | a ratio | a number B by default: image_pivots + K int(B / K) tokens stay, 132 for 128 |
    | order of the pivots | not said; here by falling norm, image before text | that of a Python set of positions |
    | batch | any | one sample |
    """

    layer: Count = 2  # drop after this many layers
    tokens: Count | None = None  # B; 128 by default
    ratio: Share | None = None  # of the image tokens, dropped: B = V (1 - ratio)
    image_pivots: Count = 4
    text_pivots: Count = 4
    variant: Variant = "release"
    renumbers = False

    def validate(self) -> None:
        super().validate()
        if self.tokens is not None and self.ratio is not None:
            raise self.mistake("tokens and ratio both say how many tokens stay; leave one out")

    def drops(self, num_layers: int) -> list[Drop]:
        keep = 1.0 if self.ratio is None else round(1 - self.ratio, 12)
        return check_drops(self.method, [Drop(self.layer, keep, ranked_by=self.layer - 1)], num_layers)

    def kept(self, drop: Drop, entered: Tensor, present: Tensor) -> Tensor:
        return self.image_pivots + (self.image_pivots + self.text_pivots) * self._each(entered)

    def _each(self, entered: Tensor) -> Tensor:
        """[P] tokens that each pivot takes."""
        budget = torch.full_like(entered, self.tokens or 128).double()
        if self.ratio is not None:
            budget = entered.double() * round(1 - self.ratio, 12)
        return (budget / (self.image_pivots + self.text_pivots)).long()

    @torch.no_grad()
    def score(self, given: LayerInput) -> Tensor:
        """CHOSEN for what pivots take; the others by how little they are like any pivot."""
        strength = rotated_keys(given).float().abs().sum(dim=(1, 3))  # [B, L]
        vectors = normalize(given.norm(given.output).float(), dim=2)
        if not len(given.present):
            return torch.zeros_like(strength)
        row, column, is_real = places = pool_columns(given)
        pivots, are_pivots = self._pivots(given, row, column, is_real, strength[row])
        own = vectors[row.unsqueeze(1), column]  # [P, V, D]
        cosines = precise_product(vectors[row.unsqueeze(1), pivots], own.transpose(1, 2))  # [P, K, V]
        is_taken = ~is_real | ((column.unsqueeze(2) == pivots.unsqueeze(1)) & are_pivots.unsqueeze(1)).any(dim=2)
        result = torch.where(is_taken, CHOSEN, -cosines.masked_fill(~are_pivots.unsqueeze(2), LEAST).amax(dim=1))
        each = to_device(self._each(given.entered), row.device).unsqueeze(1)
        for pivot in range(pivots.shape[1]):
            order = cosines[:, pivot].masked_fill(is_taken, CHOSEN).argsort(dim=1, stable=True)
            takes = torch.zeros_like(is_taken).scatter(1, order, torch.arange(order.shape[1], device=row.device) < each)
            takes &= ~is_taken & are_pivots[:, pivot : pivot + 1]
            is_taken, result = is_taken | takes, result.masked_fill(takes, CHOSEN)
        return by_token(given, places, result)

    def _pivots(
        self, given: LayerInput, row: Tensor, column: Tensor, is_real: Tensor, strength: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns of the pivots [P, K] in their order, and which of them there are."""
        last = column.amax(dim=1, keepdim=True)
        place = torch.arange(given.pool.shape[1], device=row.device)
        text = given.mask[row] & (given.pool[row] < 0) & (place > last)
        if given.answer is not None:
            text &= ~given.answer[row]
        own = _marked(text, column, is_real)
        chosen = []
        for among, count in ((own, self.image_pivots), (text, self.text_pivots)):
            best = strength.masked_fill(~among, -1).topk(min(count, strength.shape[1]), dim=1)
            chosen.append((best.indices, best.values >= 0))
        pivots, are_pivots = (torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True))
        if self.variant == "paper":
            return pivots, are_pivots
        position = (given.mask.long().cumsum(1) - 1)[row].gather(1, pivots).masked_fill(~are_pivots, -1)
        order = to_device(_set_order(position.tolist()), row.device)
        return pivots.gather(1, order), are_pivots.gather(1, order)


def _marked(like: Tensor, column: Tensor, is_real: Tensor) -> Tensor:
    """[P, L] bool, the real ones of `column` [P, V]."""
    counts = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    return counts.scatter_add_(1, column, is_real.long()) > 0


def _set_order(positions: list[list[int]]) -> Tensor:
    """[P, K], the pivots of each pool as a Python set of their positions lists them; those at -1 are none, and last."""
    orders = []
    for places in positions:
        own = [place for place in places if place >= 0]
        ordered = [places.index(place) for place in set(own)]  # a set of a list: one of a dict has another order
        orders.append([*ordered, *(i for i, place in enumerate(places) if place < 0)])
    return torch.tensor(orders)
