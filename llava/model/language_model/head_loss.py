"""The loss of a language model without the logits of a whole batch: of 11,000 tokens they may take gigabytes.

Only tokens that predict an answer go through the head, and these in chunks. A chunk's logits are made anew for its
backward pass, so that those of one chunk are there at a time.

Shapes: B rows, L tokens a row, A tokens that predict an answer, D width, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX

# All ranks must call the head equally often, whatever their batches hold: where it is sharded (ZeRO-3), each call
# gathers it from all of them.
CHUNKS = 8
# Elsewhere a small batch takes fewer: each chunk adds a gradient of the head's size to the others.
CHUNK_LOGITS = 2**24


def chunk_count(rows: float, vocabulary: int) -> int:
    """Chunks of so many tokens that predict an answer, where the head is not sharded: 2 at least, CHUNKS at most."""
    return min(CHUNKS, max(2, math.ceil(rows * vocabulary / CHUNK_LOGITS)))


def is_sharded(head: nn.Module) -> bool:
    """Whether a call of the head gathers its weights from other ranks: under ZeRO-3 or FSDP."""
    weights = [*head.parameters()]
    return hasattr(head, "_fsdp_wrapped_module") or any(hasattr(w, "ds_id") or isinstance(w, DTensor) for w in weights)


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    loss_function: Callable[..., Tensor],
    num_items_in_batch: Tensor | int | None = None,
    most: int | None = None,
) -> Tensor:
    """The loss that the head's logits of all tokens would have.

    Args:
        head: [..., D] to logits [..., V]. It is called as a module, once a chunk forward and, but for one, backward.
            Where it is sharded, these are CHUNKS, also where nothing is learnt.
        hidden: [B, L, D], of the last layer.
        labels: [B, L] int64, -100 where nothing is learnt. Each is predicted from the token before it in its row.
        loss_function: transformers' `ForCausalLMLoss`, or what takes the same arguments and sums over tokens.
        num_items_in_batch: what the sum over the answers is divided by; None: A, and NaN where that is 0.
        most: A or more, known on the host; None: the host waits for the device to count them.

    Returns:
        float32 scalar.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    learnt = targets != IGNORE_INDEX
    count = learnt.sum() if num_items_in_batch is None else num_items_in_batch
    most = int(learnt.sum()) if most is None else most
    # Where there are fewer, the last place of all fills up, which predicts nothing.
    index = torch.nonzero_static(learnt, size=most, fill_value=len(targets) - 1)[:, 0]
    rows = hidden.flatten(0, 1).index_select(0, index.to(hidden.device))

    def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
        logits = head(rows)
        shared: dict[str, Any] = {"vocab_size": logits.shape[-1], "num_items_in_batch": count}
        return loss_function(logits=logits, labels=None, shift_labels=targets, **shared)

    words = getattr(head, "out_features", None)  # unknown to the layers of some quantizations
    chunks = CHUNKS if words is None or is_sharded(head) else chunk_count(most, words)
    sizes = [(most + i) // chunks for i in range(chunks)]
    *earlier, last = zip(rows.split(sizes), targets[index].split(sizes), strict=True)
    losses = [checkpoint(loss_of, *chunk, use_reentrant=False, determinism_check="none") for chunk in earlier]
    # The backward pass begins with the last chunk, whose logits may wait for it.
    return torch.stack([*losses, loss_of(*last)]).sum()
