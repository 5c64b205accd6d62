"""Arithmetic of a training step by formula, and what part of a GPU's peak it is (MFU).

Counted are the products that the step needs, at two operations a multiply-add, as in PaLM's appendix B
(https://arxiv.org/abs/2204.02311): padding, recomputation by gradient checkpointing and the optimizer are not.

- A linear layer of W weights costs 2 W a token forward, as much for the gradient of its input and, where it is trained,
  as much for that of its weights. Frozen layers before the first trained weight have no backward pass.
- Attention over n tokens costs 4 n^2 D forward (no saving for the causal mask), and twice that backward.
- After a decoder reducer's drop, the layers see as many image tokens as it keeps by its configuration.
- The head runs on the tokens that predict an answer.
- The vision tower runs up to the last block that is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava.model.language_model.batch_counts import Totals

# Dense bfloat16 (V100, T4: float16) FLOP/s of one device, from the makers' data sheets; a longer name comes first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A30": 165e12,
    "RTX A6000": 155e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense 16-bit FLOP/s of a device by the name that torch gives it; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        if _contains(words, name.split()):
            return peak
    return None


def _contains(words: list[str], wanted: list[str]) -> bool:
    places = [words.index(word) if word in words else -1 for word in wanted]
    return -1 not in places and places == sorted(places)


@dataclass(frozen=True)
class Linear:
    """Weights of linear layers that a token passes: frozen and trained ones."""

    frozen: int = 0
    trained: int = 0

    def flops(self, passes_back: bool) -> float:
        """FLOPs a token of a training step; `passes_back`: whether weights before these are trained."""
        back = 2 * (self.frozen + self.trained) if passes_back else 0
        return 2 * (self.frozen + self.trained) + back + 2 * self.trained


class FlopsModel:
    """FLOPs of training on batches, from the sizes of a model's layers.

    Args:
        model: LLaVA's model with its head, not PEFT's wrapper, with requires_grad set as it is trained.
    """

    def __init__(self, model: Any) -> None:
        inner, config = model.get_model(), model.config
        self.layers = len(inner.layers)
        self.layer = _linear(inner.layers)
        self.head = _linear(model.lm_head)
        self.attention_width = config.num_attention_heads * head_dim(config)
        self.projector = _linear(inner.mm_projector)
        crosslayer = getattr(inner, "mm_projector_crosslayer", None)
        if crosslayer is not None:
            other = _linear(crosslayer)
            self.projector = Linear(self.projector.frozen + other.frozen, self.projector.trained + other.trained)
        self.tower = _tower_flops(inner)
        reducer = inner.decoder_reducer
        self.kept = [1.0] * self.layers if reducer is None else reducer.kept_fractions(self.layers)

    def of(self, totals: Totals) -> float:
        """FLOPs of the training steps that `totals` sums up."""
        text = totals.tokens - totals.image_tokens
        result = totals.image_tokens * self.projector.flops(passes_back=False) + totals.tiles * self.tower
        for kept in self.kept:
            tokens = text + totals.image_tokens * kept
            squares = totals.squares * (tokens / max(totals.tokens, 1)) ** 2
            result += tokens * self.layer.flops(passes_back=True) / self.layers
            result += 3 * 4 * squares * self.attention_width
        return result + totals.answer_tokens * self.head.flops(passes_back=True)


def _linear(module: nn.Module) -> Linear:
    """Sizes of all linear layers inside; by features, because ZeRO-3 and quantization change the weights' shapes."""
    frozen = trained = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            size = layer.in_features * layer.out_features
            trained += size if layer.weight.requires_grad else 0
            frozen += 0 if layer.weight.requires_grad else size
    return Linear(frozen, trained)


def head_dim(config: Any) -> int:
    """Width of one head of a language model's attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tower_flops(inner: Any) -> float:
    """FLOPs of one picture."""
    tower, depth = inner.get_vision_tower(), inner.tower_depth_read
    encoder = tower.vision_tower
    run = [_linear(block) for block in encoder.encoder.layers[:depth]]
    tokens = tower.num_patches + int(tower.has_cls)
    patches = tower.num_patches * math.prod((3, tower.config.patch_size, tower.config.patch_size, tower.hidden_size))
    linear = tokens * sum(block.frozen + block.trained for block in run) + patches
    forward = 2 * linear + 4 * depth * tokens**2 * tower.hidden_size
    return forward * (3 if any(block.trained for block in run) else 1)


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
