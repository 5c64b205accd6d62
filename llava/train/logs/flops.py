"""Arithmetic of training steps, and what part of a GPU's peak it is (MFU); the formulas are those of `llava.cost`.

Counted are the products that the step needs, at two operations a multiply-add, as in PaLM's appendix B
(https://arxiv.org/abs/2204.02311): padding, recomputation (of layers and logits), ranking and the optimizer are not.
"""

from __future__ import annotations

from typing import Any

import torch

from llava.cost.devices import peak_flops
from llava.cost.formulas import OPERATIONS, step_macs
from llava.cost.sizes import Sizes
from llava.cost.tokens import projector_passes, tower_lengths
from llava.cost.training import layer_step_macs, projector_step_macs, tower_step_macs
from llava.model.language_model.batch_counts import Totals


class FlopsModel:
    """FLOPs of training on batches, from the sizes of a model's layers.

    Args:
        model: LLaVA's model with its head, not PEFT's wrapper, with requires_grad set as it is trained.
    """

    def __init__(self, model: Any) -> None:
        inner = model.get_model()
        self.sizes = Sizes.of(model)
        self.tile = tower_step_macs(self.sizes, tower_lengths(model, inner.reducers()), tiles=1)
        learns = any(p.requires_grad for part in inner.projector_modules().values() for p in part.parameters())
        tower_learns = any(p.requires_grad for p in inner.get_vision_tower().parameters())
        tokens, passes = projector_passes(model, inner.reducers())
        self.image_token = projector_step_macs(passes, learns, after=tower_learns) / tokens
        self._decoder_reducer = inner.decoder_reducer

    def of(self, totals: Totals) -> float:
        """FLOPs of the training steps that `totals` sums up."""
        text = totals.tokens - totals.image_tokens
        macs = totals.image_tokens * self.image_token + totals.tiles * self.tile
        entered = max(1, round(totals.image_tokens / max(totals.images, 1)))
        layers, reducer = len(self.sizes.layers), self._decoder_reducer
        counts = [entered] * layers if reducer is None else reducer.layer_counts(layers, entered)
        for layer, count in enumerate(counts):
            tokens = text + totals.image_tokens * count / entered
            squares = totals.squares * (tokens / max(totals.tokens, 1)) ** 2
            macs += layer_step_macs(self.sizes, layer, tokens, squares)
        return OPERATIONS * (macs + totals.answer_tokens * step_macs(self.sizes.head, passes_back=True))


def utilization(flops: float, seconds: float, processes: int, computes_16_bit: bool) -> float | None:
    """MFU: the fraction of the devices' peak that a stretch of training reached; None where the peak is not known.

    Args:
        flops: of all processes together.
        seconds: how long it took.
        processes: devices.
        computes_16_bit: whether products are computed in bfloat16 or float16, which the peaks are of.
    """
    if not (computes_16_bit and torch.cuda.is_available()):
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else round(flops / (seconds * processes * peak), 4)
