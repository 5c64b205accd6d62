"""What a run's log says of its batches: visual tokens, padding, throughput. Counting never waits for the device."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
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


@dataclass
class Totals:
    """Sums over batches, of one process or of all.

    Attributes:
        tokens: real tokens that entered the language model.
        squares: sum over rows of the square of their real tokens; what attention costs.
        image_tokens: those of `tokens` that are of an image.
        image_tokens_last: those of them that reach the last layer.
        images: images (with anyres, all tiles of a picture are one).
        samples: rows of the batches.
        places: tokens with padding, as they were computed.
        tiles: pictures that went through the vision tower for them.
    """

    tokens: float = 0
    squares: float = 0
    image_tokens: float = 0
    image_tokens_last: float = 0
    images: float = 0
    samples: float = 0
    places: float = 0
    tiles: float = 0


class BatchMeter:
    """Watches the batches that enter a LLaVA model in training.

    Counts stay on the device until they are read.

    Args:
        model: LLaVA's model with its head, not PEFT's wrapper.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._splice = model.splice_images
        model.splice_images = self._splice_and_note
        self._hook = model.get_model().register_forward_hook(self._record, with_kwargs=True)
        self._tower_hook = model.get_vision_tower().register_forward_hook(self._record_tiles)
        self._spliced: Any = None
        self._images: Tensor | None = None
        self._tiles = 0
        self._counts: list[Tensor] = []  # of one batch: [8] int64, in the order of `Totals`

    def _splice_and_note(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        spliced = self._splice(input_ids, *args, **kwargs)
        if self._model.training and torch.is_grad_enabled():
            self._spliced, self._images = spliced, (input_ids == IMAGE_TOKEN_INDEX).sum()
        return spliced

    def _record_tiles(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        self._tiles = len(args[0])

    def _record(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        spliced, self._spliced = self._spliced, None
        if spliced is None or self._images is None:
            return
        staged = kwargs.get("staged")
        mask = spliced.attention_mask.bool()
        is_image = (spliced.image_index >= 0) & mask
        rows = mask.sum(dim=1)
        last = is_image
        if staged is not None and staged.kept is not None:
            last = is_image.gather(1, staged.kept.clamp(min=0)) & (staged.kept >= 0)
        total, images = rows.sum(), self._images
        packed = staged is not None and staged.packed
        places = total if packed else torch.full_like(total, mask.numel())
        # A batch of text only sends a blank picture through the tower, which is no useful work.
        tiles = self._tiles * (images > 0).long()
        sums = [total, rows.square().sum(), is_image.sum(), last.sum(), images, torch.full_like(total, len(mask))]
        self._counts.append(torch.stack([*sums, places, tiles]))

    def read(self, device: torch.device) -> Tensor:
        """Sums on this process since the last reading, [8] float64, in the order of `Totals`."""
        if not self._counts:
            return torch.zeros(8, dtype=torch.float64, device=device)
        sums = torch.stack(self._counts).sum(dim=0).to(device=device, dtype=torch.float64)
        self._counts.clear()
        return sums


class AnswerMeter:
    """Counts the tokens that a LLaVA model has learned to give: labels that the limit on the length left.

    Args:
        model: LLaVA's model with its head, or PEFT's wrapper of it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._splice = self._model.splice_images
        self._model.splice_images = self._splice_and_count
        self._count: Tensor | None = None

    def _splice_and_count(self, *args: Any, **kwargs: Any) -> Any:
        spliced = self._splice(*args, **kwargs)
        if spliced.labels is not None and self._model.training and torch.is_grad_enabled():
            count = (spliced.labels[:, 1:] != IGNORE_INDEX).sum(dtype=torch.int64).view(1)
            self._count = count if self._count is None else self._count + count
        return spliced

    def read(self, device: torch.device) -> Tensor:
        """How many on this process since the beginning, [1] int64."""
        return torch.zeros(1, dtype=torch.int64, device=device) if self._count is None else self._count.to(device)


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
