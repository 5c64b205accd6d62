"""The loss of a language model without the logits of a whole batch: of 11,000 tokens they may take gigabytes.

Only tokens that predict an answer go through the head, and these in chunks. A chunk's logits are made anew for its
backward pass, so that those of one chunk are there at a time.

Shapes: B rows, L tokens a row, A tokens that predict an answer, D width, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX

# All ranks must call the head equally often, whatever their batches hold: where it is sharded (ZeRO-3), each call
# gathers it from all of them.
CHUNKS = 8


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
        head: [..., D] to logits [..., V]. It is called as a module, CHUNKS times forward and CHUNKS - 1 times more
            backward, also where nothing is learnt.
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

    sizes = [(most + i) // CHUNKS for i in range(CHUNKS)]
    *earlier, last = zip(rows.split(sizes), targets[index].split(sizes), strict=True)
    losses = [checkpoint(loss_of, *chunk, use_reentrant=False, determinism_check="none") for chunk in earlier]
    # The backward pass begins with the last chunk, whose logits may wait for it.
    return torch.stack([*losses, loss_of(*last)]).sum()
