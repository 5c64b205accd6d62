"""SparseVLM: the question's visual words choose the image tokens, in three steps; the best of the others are recycled.

Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
https://arxiv.org/abs/2410.04417, section 3. Version 2.0 is the release's SparseVLM+.
Shapes: B rows, L tokens a row, Q raters a row, P pools of image tokens, V tokens of a pool at most, M recycled tokens
of a pool at most, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, EnteringTokens, LayerInput, MergedTokens
from llava.reduction.decoder.density_peaks import merge_by_density
from llava.reduction.decoder.ranking import attention_of_heads, by_token, pool_columns
from llava.reduction.options import Count, Natural
from llava.reduction.registry import register
from llava.reduction.selection import precise_product

LAYERS, DEPTH = (2, 6, 15), 32  # the release's, and of how many
PATCHES = 576  # of the pictures that its tables are for
TABLES = {  # tokens: what is kept at each drop
    "1.5": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "2.0": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
HEADS = 14


@register("sparsevlm")
class SparseVLM(DecoderReducer):
    """After each of a few layers, keep the image tokens to which the raters attend most in that layer.

    Raters are the text tokens after the last image whose product with its tokens, as they enter, is above the mean;
    tokens that are learnt are none, and a row without any text there drops nothing. 1.5 clusters the best 30 % of what
    it drops into a token for every ten, which come after the kept ones, and numbers positions anew. 2.0 divides
    attention by what it would be between equal tokens at such a distance, reads the heads with the greatest sums only,
    recycles nothing, and keeps positions. A pool of tokens (an image, or a sample) is reduced on its own.

    | point | paper | release |
    |---|---|---|
    | number kept | adaptive, from the rank of the attention matrix | tables since v1.5; interpolated between them |
    | density | deterministic | plus uniform noise below 1e-6, so that no run repeats; here without |
    | images, batch | not said | one image, one sample; here any, each image by itself (`pool: image`) |
    | depth | 32 layers | 32 layers; here `layers` are scaled to other depths |
    """

    version: Literal["1.5", "2.0"] = "1.5"
    layers: list[Natural] | None = None  # drop after these, counted from 0; 2, 6, 15 of 32 by default
    keep: list[Count] | None = None  # of each image, at each drop, but never all that are there
    tokens: Count | None = None  # in place of keep: 192 (the default), 128, 96 and 64 are the release's tables
    heads: Count | None = None  # of version 2.0, that are read; 14 by default, and at most all

    budget_conflicts = ("keep",)

    def validate(self) -> None:
        super().validate()
        if self.keep is not None and self.tokens is not None:
            raise self.mistake("keep and tokens both say how many tokens stay; leave one out")
        layers, keep = (LAYERS if given is None else given for given in (self.layers, self.keep))
        if len(layers) != len(keep):
            raise self.mistake(
                f"layers={self.layers!r} and keep={self.keep!r} must be lists of one length, a number for each drop; "
                f"without one of them there are {len(LAYERS)}"
            )
        if sorted(set(layers)) != list(layers):
            raise self.mistake(f"layers={self.layers!r} must rise")
        if self.heads is not None and self.version == "1.5":
            raise self.mistake("heads are of version 2.0; 1.5 reads all")

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        return [{"tokens": count} for count in range(1, max(entering, PATCHES) + 1)]

    @property
    def renumbers(self) -> bool:
        return self.version == "1.5"

    def drops(self, num_layers: int) -> list[Drop]:
        layers = scaled_layers(num_layers) if self.layers is None else self.layers
        if outside := [layer for layer in layers if layer > num_layers - 2]:
            raise self.mistake(
                f"layers={outside}: this language model has {num_layers} layers, after which a drop must leave one: "
                f"choose from 0 to {num_layers - 2}"
            )
        keep = interpolated(TABLES[self.version], self.tokens or 192) if self.keep is None else self.keep
        return [Drop(layer + 1, count, ranked_by=layer) for layer, count in zip(layers, keep, strict=True)]

    def kept(self, drop: Drop, entered: Tensor, present: Tensor) -> Tensor:
        return super().kept(drop, entered, present).minimum(present - 1).clamp(min=1)

    def merged(self, drop: Drop, dropped: Tensor) -> Tensor:
        clusters = recycled(dropped) // 10 + 1
        return torch.where((dropped > 0) & (self.version == "1.5"), clusters, 0)

    @torch.no_grad()
    def queries(self, given: EnteringTokens) -> Tensor:
        is_image = given.pool >= 0
        column = torch.arange(is_image.shape[1], device=is_image.device)
        last = column.masked_fill(~is_image, -1).amax(dim=1, keepdim=True)
        text = given.mask & (column > last) & (last >= 0)
        if given.answer is not None:
            text &= ~given.answer
        ratings = torch.stack([_ratings(*row) for row in zip(given.hidden, is_image, text, strict=True)])
        mean = (ratings * text).sum(dim=1, keepdim=True) / text.sum(dim=1, keepdim=True).clamp(min=1)
        above = text & (ratings > mean)
        return torch.where(above.any(dim=1, keepdim=True), above, text)

    @torch.no_grad()
    def score(self, given: LayerInput) -> Tensor:
        if self.version == "1.5":
            return attention_of_heads(given).mean(dim=1)
        attention = attention_of_heads(given, gravity(given))
        if not len(given.present):
            return attention[:, 0]
        row, column, is_real = places = pool_columns(given)
        own = attention[row].gather(2, column.unsqueeze(1).expand(-1, attention.shape[1], -1))
        own = own.masked_fill(~is_real.unsqueeze(1), 0)
        chosen = self.strongest_heads(own)
        best = own.gather(1, chosen.unsqueeze(2).expand(-1, -1, own.shape[2])).mean(dim=1)
        return by_token(given, places, best)

    def strongest_heads(self, attention: Tensor) -> Tensor:
        """The heads that count of [P, H, V], by falling sum: [P, heads] int64."""
        return attention.sum(dim=2).topk(min(self.heads or HEADS, attention.shape[1]), dim=1).indices

    def merge(self, given: LayerInput, scores: Tensor, keep: Tensor) -> MergedTokens:
        row, column, is_real = pool_columns(given)
        row = row.unsqueeze(1)
        counts = recycled(given.present - given.kept)
        dropped = scores[row, column].masked_fill(~is_real | keep[row, column], -torch.inf)
        best = dropped.argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        columns = column.gather(1, best)
        centres, features = merge_by_density(given.output[row, columns], counts, given.merged)
        return MergedTokens(features, columns.gather(1, centres))


def scaled_layers(num_layers: int) -> list[int]:
    """The release's layers, in a model of another depth: after the same parts of it, each later than the one before."""
    layers: list[int] = []
    for layer in LAYERS:
        least = layers[-1] + 1 if layers else 0
        layers.append(max(least, round((layer + 1) * num_layers / DEPTH) - 1))
    return layers


def interpolated(table: Mapping[int, Sequence[int]], tokens: int) -> list[int]:
    """What is kept at each drop for `tokens`: linear between the table's numbers, 0, and all patches for all."""
    ends = {0: [0] * len(LAYERS), **table, PATCHES: [PATCHES] * len(LAYERS)}
    if tokens >= PATCHES:
        return [tokens] * len(LAYERS)
    low = max(number for number in ends if number <= tokens)
    high = min(number for number in ends if number > tokens)
    part = (tokens - low) / (high - low)
    return [max(1, round(a + (b - a) * part)) for a, b in zip(ends[low], ends[high], strict=True)]


def recycled(dropped: Tensor) -> Tensor:
    """Tokens that are clustered of [P] dropped ones."""
    return torch.where(dropped > 0, (dropped.double() * 0.3).long() + 1, 0)


def gravity(given: LayerInput) -> Tensor:
    """[B, Q, L] float32, what rotation makes of the product of all-ones queries and keys, by the scale of attention.

    It is 2 / sqrt(d) times the sum of cos((p_i - p_j) f) over the rotary frequencies f, p the positions. It crosses 0,
    so that it is computed in float32 whatever the model's dtype.
    """
    like = torch.empty(0, dtype=torch.float32, device=given.positions.device)
    cos, sin = given.rotary(like, given.positions)
    wheel = torch.cat([cos, sin], dim=2).to(like.device).expand(len(given.positions), -1, -1)
    queries = wheel.gather(1, given.queries.unsqueeze(2).expand(-1, -1, wheel.shape[2]))
    product = precise_product(queries, wheel.transpose(1, 2)) / cos.shape[2] ** 0.5
    return product.masked_fill(product == 0, torch.finfo(product.dtype).tiny)


def _ratings(hidden: Tensor, is_image: Tensor, text: Tensor) -> Tensor:
    """How much image tokens choose each text token, the mean over them: [L] of hidden [L, D] and masks [L]."""
    logits = precise_product(hidden, hidden.T)
    chosen = logits.masked_fill(~text, torch.finfo(logits.dtype).min).softmax(dim=1)
    return (chosen * is_image.unsqueeze(1)).sum(dim=0) / is_image.sum().clamp(min=1)
