"""What a run's log says of its batches: visual tokens, padding, throughput. Counting never waits for the device."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.language_model.batch_counts import Totals
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


class BatchMeter:
    """Adds up what batches hold. The sums stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [9] int64, in the order of `Totals`

    def note(self, counts: Tensor) -> None:
        """Add the counts of one batch, as `LlavaOutput` has them."""
        self._sums = counts if self._sums is None else self._sums + counts

    def read(self, device: torch.device) -> Tensor:
        """Sums on this process since the last reading, [9] float64, in the order of `Totals`."""
        sums, self._sums = self._sums, None
        if sums is None:
            return torch.zeros(len(fields(Totals)), dtype=torch.float64, device=device)
        return sums.to(device=device, dtype=torch.float64)


class Stopwatch:
    """Seconds of training, without those spent on checkpoints and evaluation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._pause: float | None = None

    def pause(self) -> None:
        """Stop counting."""
        self._pause = time.perf_counter()

    def go_on(self) -> None:
        """Count again."""
        if self._pause is not None:
            self._start += time.perf_counter() - self._pause
            self._pause = None

    def lap(self) -> float:
        """Seconds since the last lap or the beginning."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds


def peak_memory() -> float:
    """Most memory that this process has held, in GB: of the GPU where there is one, otherwise of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe(totals: Totals, seconds: float, has_decoder_reducer: bool) -> dict[str, float]:
    """Log entries of a stretch of training.

    Args:
        totals: over all processes.
        seconds: how long it took.
        has_decoder_reducer: whether fewer image tokens leave the language model than enter it.
    """
    entries = {
        "tokens_per_second": round(totals.tokens / seconds, 1),
        "samples_per_second": round(totals.samples / seconds, 3),
        "padding": round(1 - totals.tokens / totals.places, 4),
    }
    if totals.images:
        entries["image_tokens"] = round(totals.image_tokens / totals.images, 2)
        if has_decoder_reducer:
            entries["image_tokens_last"] = round(totals.image_tokens_last / totals.images, 2)
    return entries
