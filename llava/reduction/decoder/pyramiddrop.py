"""PyramidDrop: fewer image tokens in each stage of the language model's layers.

Paper: PyramidDrop, https://arxiv.org/abs/2410.17247, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava.reduction.base import DecoderReducer, Drop, LayerInput, Options, check_count, is_count, is_number
from llava.reduction.decoder.ranking import PoolOptions, check_drops, received_attention
from llava.reduction.registry import register


@dataclass(kw_only=True)
class PyramidDropOptions(PoolOptions):
    """Options of `pyramiddrop`: where and how much, as two lists or as the paper's lambda and number of stages."""

    layers: list[int] | None = None  # drop after this many layers, e.g. [8, 16, 24]
    ratios: list[float] | None = None  # what is left then of the tokens that entered, e.g. [0.5, 0.25, 0.125]
    lambda_: float | None = None  # in YAML `lambda`: what each drop leaves of the tokens before it; 0.5 by default
    stages: int | None = None  # stages of equal depth; 4 by default

    @classmethod
    def parse(cls, method: str, given: Mapping[str, Any]) -> Options:
        return super().parse(method, {"lambda_" if key == "lambda" else key: value for key, value in given.items()})

    def validate(self, method: str) -> None:
        super().validate(method)
        if (self.layers is None) != (self.ratios is None):
            raise ValueError(f"method '{method}': layers and ratios go together; give both, or lambda and stages")
        if self.layers is not None and (self.lambda_ is not None or self.stages is not None):
            raise ValueError(f"method '{method}': give layers and ratios, or lambda and stages, not both")
        if self.layers is not None and self.ratios is not None:
            self._validate_lists(method, self.layers, self.ratios)
        if self.lambda_ is not None and not (is_number(self.lambda_) and 0 < self.lambda_ <= 1):
            raise ValueError(f"method '{method}': lambda={self.lambda_!r} must be a number above 0 and at most 1")
        if self.stages is not None:
            check_count(method, "stages", self.stages)

    @staticmethod
    def _validate_lists(method: str, layers: Any, ratios: Any) -> None:
        if not (isinstance(layers, list | tuple) and isinstance(ratios, list | tuple) and len(layers) == len(ratios)):
            raise ValueError(
                f"method '{method}': layers={layers!r} and ratios={ratios!r} must be lists of one length, a ratio for "
                "each drop"
            )
        if not all(map(is_count, layers)) or sorted(set(layers)) != list(layers):
            raise ValueError(f"method '{method}': layers={layers!r} must be rising whole numbers, 1 or more")
        if not all(is_number(r) and 0 <= r <= 1 for r in ratios) or sorted(ratios, reverse=True) != list(ratios):
            raise ValueError(
                f"method '{method}': ratios={ratios!r} must fall from at most 1 to at least 0; each is the fraction "
                "that is left of the tokens that entered the language model"
            )

    def resolve(self, num_layers: int) -> list[tuple[int, float]]:
        """(layers that have run, fraction left) of each drop."""
        if self.layers is not None and self.ratios is not None:
            return list(zip(self.layers, self.ratios, strict=True))
        keep = 0.5 if self.lambda_ is None else self.lambda_
        stages = 4 if self.stages is None else self.stages
        return [(num_layers * stage // stages, keep**stage) for stage in range(1, stages)]


@register("pyramiddrop")
class PyramidDrop(DecoderReducer):
    """After each stage, keep the image tokens to which the instruction attends most in the layer that comes next.

    Without options: four stages of equal depth, each with half of the image tokens of the one before (in 32 layers:
    1/2 after 8, 1/4 after 16, 1/8 after 24).
    """

    options_class = PyramidDropOptions
    options: PyramidDropOptions

    @property
    def pool(self) -> str:
        return self.options.pool

    def drops(self, num_layers: int) -> list[Drop]:
        drops = [Drop(after, keep, ranked_by=after) for after, keep in self.options.resolve(num_layers)]
        return check_drops("pyramiddrop", drops, num_layers)

    def score(self, given: LayerInput) -> Tensor:
        return received_attention(given)
