"""VScan's drop inside the language model: PyramidDrop's ranking, and a number of tokens that stays.

Paper: VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models,
https://arxiv.org/abs/2505.22654. Its first half, after the tower, is `vscan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, LayerInput
from llava.reduction.decoder.ranking import attention_from_queries, check_drops
from llava.reduction.options import Count
from llava.reduction.registry import register


@register("vscan_drop")
class VScanDrop(DecoderReducer):
    """After each of `layers`, keep the `keep` image tokens to which the last token attends most in the layer that
    comes next.

    Positions are numbered anew after a drop. Where fewer image tokens are left than `keep`, all stay. In training the
    tokens that stand before an answer rank.

    | point | release | here |
    |---|---|---|
    | batch | one sample in decoding | any |
    | layer | 16 of 32 | after half of the layers, or `layers` |
    """

    layers: list[Count] | None = None  # drop after this many layers; after half of them by default
    keep: list[Count] | None = None  # image tokens that stay at each drop; 32 by default

    def validate(self) -> None:
        super().validate()
        layers, keep = [1] if self.layers is None else self.layers, self._counts
        if len(layers) != len(keep):
            raise self.mistake(
                f"layers={self.layers!r} and keep={self.keep!r} must be lists of one length, a number for each drop"
            )
        if sorted(set(layers)) != list(layers):
            raise self.mistake(f"layers={self.layers!r} must rise")
        if sorted(keep, reverse=True) != list(keep):
            raise self.mistake(f"keep={self.keep!r} must fall; each is the number that is left of an image's tokens")

    @property
    def _counts(self) -> list[int]:
        return [32] if self.keep is None else self.keep

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        return [{"keep": [count]} for count in range(1, entering + 1)]

    def drops(self, num_layers: int) -> list[Drop]:
        layers = [num_layers // 2] if self.layers is None else self.layers
        drops = [Drop(after, keep, ranked_by=after) for after, keep in zip(layers, self._counts, strict=True)]
        return check_drops(self.method, drops, num_layers)

    def score(self, given: LayerInput) -> Tensor:
        return attention_from_queries(given)
