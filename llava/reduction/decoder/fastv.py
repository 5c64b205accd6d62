"""FastV: drop image tokens once, after an early layer of the language model.

Paper: An Image is Worth 1/2 Tokens After Layer 2, https://arxiv.org/abs/2403.06764, section 4.
"""

from __future__ import annotations

from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, LayerInput
from llava.reduction.decoder.ranking import attention_from_queries, check_drops
from llava.reduction.options import Count, Share
from llava.reduction.registry import register


@register("fastv")
class FastV(DecoderReducer):
    """After layer K, keep the 1 - R of the image tokens to which the last token attends most in layer K itself.

    Tokens keep their positions. The paper drops in inference only; here training drops too, ranked by the tokens that
    stand before an answer.
    """

    layer: Count = 2  # K: drop after this many layers
    ratio: Share | None = None  # R: the fraction of the image tokens that is dropped; 0.5 by default
    tokens: Count | None = None  # that stay of an image, in place of the ratio
    renumbers = False

    def validate(self) -> None:
        super().validate()
        if self.tokens is not None and self.ratio is not None:
            raise self.mistake("tokens and ratio both say how many tokens stay; leave one out")

    def drops(self, num_layers: int) -> list[Drop]:
        # 1 - 0.9 is 0.09999999999999998, and a token less
        keep = self.tokens or round(1 - (0.5 if self.ratio is None else self.ratio), 12)
        return check_drops(self.method, [Drop(self.layer, keep, ranked_by=self.layer - 1)], num_layers)

    def kept(self, drop: Drop, entered: Tensor, present: Tensor) -> Tensor:
        if self.tokens is not None:
            return super().kept(drop, entered, present)
        return (entered.double() * drop.keep).round().long()

    def score(self, given: LayerInput) -> Tensor:
        return attention_from_queries(given)
