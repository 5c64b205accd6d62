"""What a batch of training holds: counts that the forward pass returns with its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.model.language_model.staged import StagedPass
from llava.model.splice import Spliced
from llava.transfer import to_device


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
        answer_tokens: those of `tokens` that the model learns to give.
    """

    tokens: float = 0
    squares: float = 0
    image_tokens: float = 0
    image_tokens_last: float = 0
    images: float = 0
    samples: float = 0
    places: float = 0
    tiles: float = 0
    answer_tokens: float = 0


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """transformers' output of a language model, and of what the batch was.

    Attributes:
        counts: [9] int64, of this batch, in the order of `Totals`. A field of its own, because mixed precision and DDP
            make the output anew from its fields.
    """

    counts: Tensor | None = None


ONCE = ("images", "samples", "tiles")  # counted once where a batch goes through the language model several times


def mean_output(outputs: Sequence[Any]) -> Any:
    """The output of a step that is several passes over one batch: the mean of their losses, the sum of their tokens.

    Args:
        outputs: `LlavaOutput`s; or tuples, whose first is the loss.
    """
    losses = torch.stack([output[0] for output in outputs])
    if isinstance(outputs[0], tuple):
        return (losses.mean(),)
    counts = torch.stack([output.counts for output in outputs])
    once = to_device(torch.tensor([field.name in ONCE for field in fields(Totals)]), counts.device)
    return LlavaOutput(loss=losses.mean(), counts=torch.where(once, counts[0], counts.sum(dim=0)))


def count_batch(spliced: Spliced, staged: StagedPass | None) -> Tensor:
    """Count what a batch holds, without waiting for the device.

    Args:
        spliced: the batch as it entered the language model, with labels.
        staged: the pass that it went through, after it; None where no token was dropped or packed.

    Returns:
        [9] int64 on the batch's device, in the order of `Totals`.
    """
    assert spliced.labels is not None
    mask = spliced.attention_mask.bool()
    is_image = (spliced.image_index >= 0) & mask
    rows = mask.sum(dim=1)
    last = is_image
    if staged is not None and staged.kept is not None:
        kept = staged.kept.to(mask.device)
        last = is_image.gather(1, kept.clamp(min=0)) & (kept >= 0)
    total = rows.sum()

    def known(number: int) -> Tensor:
        return torch.full_like(total, number)

    counts = {
        "tokens": total,
        "squares": rows.square().sum(),
        "image_tokens": is_image.sum(),
        "image_tokens_last": last.sum(),
        "images": known(spliced.images),
        "samples": known(len(mask)),
        "places": total if staged is not None and staged.packed else known(mask.numel()),
        "tiles": known(spliced.tiles),
        "answer_tokens": (spliced.labels[:, 1:] != IGNORE_INDEX).sum(),
    }
    return torch.stack([counts[field.name] for field in fields(Totals)])
