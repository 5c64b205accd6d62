"""PyramidDrop: fewer image tokens in each stage of the language model's layers.

Paper: PyramidDrop, https://arxiv.org/abs/2410.17247, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, LayerInput
from llava.reduction.decoder.ranking import attention_from_queries, check_drops
from llava.reduction.options import Count, Fraction, Share
from llava.reduction.registry import register


@register("pyramiddrop")
class PyramidDrop(DecoderReducer):
    """After each stage, keep the image tokens to which the instruction attends most in the layer that comes next.

    Without options: four stages of equal depth, each with half of the image tokens of the one before (in 32 layers:
    1/2 after 8, 1/4 after 16, 1/8 after 24).
    """

    layers: list[Count] | None = None  # drop after this many layers, e.g. [8, 16, 24]
    ratios: list[Share] | None = None  # what is left then of the tokens that entered, e.g. [0.5, 0.25, 0.125]
    lambda_: Fraction | None = None  # what each drop leaves of the tokens before it; 0.5 by default
    stages: Count | None = None  # of equal depth; 4 by default

    budget_conflicts = ("layers", "ratios")

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """What each drop leaves, in thousandths."""
        return [{"lambda": part / 1000} for part in range(1, 1001)]

    def validate(self) -> None:
        super().validate()
        if (self.layers is None) != (self.ratios is None):
            raise self.mistake("layers and ratios go together; give both, or lambda and stages")
        if self.layers is None or self.ratios is None:
            return
        if self.lambda_ is not None or self.stages is not None:
            raise self.mistake("give layers and ratios, or lambda and stages, not both")
        if len(self.layers) != len(self.ratios):
            raise self.mistake(
                f"layers={self.layers!r} and ratios={self.ratios!r} must be lists of one length, a ratio for each drop"
            )
        if sorted(set(self.layers)) != list(self.layers):
            raise self.mistake(f"layers={self.layers!r} must rise")
        if sorted(self.ratios, reverse=True) != list(self.ratios):
            raise self.mistake(
                f"ratios={self.ratios!r} must fall; each is the fraction that is left of the tokens that entered the "
                "language model"
            )

    def drops(self, num_layers: int) -> list[Drop]:
        drops = [Drop(after, keep, ranked_by=after) for after, keep in self._resolve(num_layers)]
        return check_drops(self.method, drops, num_layers)

    def _resolve(self, num_layers: int) -> list[tuple[int, float]]:
        """(layers that have run, fraction left) of each drop."""
        if self.layers is not None and self.ratios is not None:
            return list(zip(self.layers, self.ratios, strict=True))
        keep = 0.5 if self.lambda_ is None else self.lambda_
        stages = 4 if self.stages is None else self.stages
        return [(num_layers * stage // stages, keep**stage) for stage in range(1, stages)]

    def score(self, given: LayerInput) -> Tensor:
        return attention_from_queries(given)
