"""FastV: drop image tokens once, after an early layer of the language model.

Paper: An Image is Worth 1/2 Tokens After Layer 2, https://arxiv.org/abs/2403.06764, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, LayerInput, check_count, is_number
from llava.reduction.decoder.ranking import PoolOptions, check_drops, received_attention
from llava.reduction.registry import register


@dataclass(kw_only=True)
class FastVOptions(PoolOptions):
    """Options of `fastv`, named as in its paper."""

    layer: int = 2  # K: drop after this many layers
    ratio: float = 0.5  # R: the fraction of the image tokens that is dropped

    def validate(self, method: str) -> None:
        super().validate(method)
        check_count(method, "layer", self.layer)
        if not is_number(self.ratio) or not 0 <= self.ratio <= 1:
            raise ValueError(
                f"method '{method}': ratio={self.ratio!r} must be a number from 0 to 1, the fraction that is dropped"
            )


@register("fastv")
class FastV(DecoderReducer):
    """After layer K, keep the 1 - R of the image tokens to which the last token attends most in layer K itself.

    Tokens keep their positions. The paper drops in inference only; here training drops too, ranked by the tokens that
    stand before an answer.
    """

    options_class = FastVOptions
    options: FastVOptions
    renumbers = False

    @property
    def pool(self) -> str:
        return self.options.pool

    def drops(self, num_layers: int) -> list[Drop]:
        layer = self.options.layer
        keep = round(1 - self.options.ratio, 12)  # 1 - 0.9 is 0.09999999999999998, and a token less
        return check_drops("fastv", [Drop(layer, keep, ranked_by=layer - 1)], num_layers)

    def score(self, given: LayerInput) -> Tensor:
        return received_attention(given)
