"""How many visual tokens a reducer keeps, for the training log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava.reduction.base import VisualTokens


class VisualTokenMeter:
    """Watches a reducer and collects the counts of what it hands on, without waiting for the device.

    Args:
        reducer: of the model; its output is `VisualTokens`.
    """

    def __init__(self, reducer: nn.Module) -> None:
        self._counts: list[Tensor] = []
        self._hook = reducer.register_forward_hook(self._record)

    def _record(self, _module: nn.Module, _inputs: Any, tokens: VisualTokens) -> None:
        if torch.is_grad_enabled():  # training, not evaluation
            self._counts.append(tokens.counts.detach())

    def read(self) -> dict[str, float]:
        """Mean, least and most tokens an image (a tile, with anyres) on this process since the last reading."""
        if not self._counts:
            return {}
        counts = torch.cat(self._counts).float()
        self._counts.clear()
        return {
            "visual_tokens": round(counts.mean().item(), 2),
            "visual_tokens_min": counts.min().item(),
            "visual_tokens_max": counts.max().item(),
        }
