"""Between host and device: copies that the host does not wait for, and what it knows of a batch without a copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host to a device. From pinned memory, so that nothing waits for what runs there."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@dataclass(frozen=True)
class HostBatch:
    """The ids of a batch as the host has them: lengths and places follow from them without a copy from the device.

    The collator hands one on with the batch; whoever changes the batch after that leaves it out:
    on a GPU only its shapes are compared with the batch's, because to compare values is to wait for the device.

    Attributes:
        input_ids: [B, S] int64.
        mask: [B, S] bool, real tokens.
        labels: [B, S] int64, or None.
    """

    input_ids: Tensor
    mask: Tensor
    labels: Tensor | None = None

    @classmethod
    def read(cls, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> HostBatch:
        """One copy from the device, which waits for it; none for tensors that are on the host."""
        given = [tensor.long() for tensor in (input_ids, attention_mask, labels) if tensor is not None]
        read = list(given if input_ids.device.type == "cpu" else torch.stack(given).cpu())
        ids, labels = read.pop(0), read.pop() if labels is not None else None
        return cls(ids, read[0].bool() if read else torch.ones_like(ids, dtype=torch.bool), labels)
