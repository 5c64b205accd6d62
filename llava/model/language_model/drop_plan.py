"""Which image tokens compete, how many of them stay, and where the kept ones go: arithmetic of the staged runner.

Shapes: B rows, L tokens a row, P pools of image tokens that compete for places, Q query tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.reduction.base import DecoderReducer, Drop
from llava.transfer import to_device


@dataclass
class Pools:
    """Which image tokens compete, and how many there are; on the host but for the tensors of shape [B, L].

    Attributes:
        pool: [B, L] int64, the pool of a token, -1 for what is never dropped.
        is_query: [B, L] bool, tokens whose attention ranks, in rows with images; they are never dropped themselves.
        sizes: [P] int64, tokens of each pool that entered the language model.
        row: [P] int64, the row that a pool lies in.
        least: [P] int64, tokens that a pool keeps in any case: its queries; all, in a row without a query.
        others: [B] int64, real tokens of a row outside all pools.
        queries: Q, the most queries of a row, at least 1.
        left: whether rows are padded on the left.
        is_answer: [B, L] bool, tokens with a label; None without labels.
    """

    pool: Tensor
    is_query: Tensor
    sizes: Tensor
    row: Tensor
    least: Tensor
    others: Tensor
    queries: int
    left: bool
    is_answer: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Follow the hidden states to another device."""
        self.pool, self.is_query = self.pool.to(device), self.is_query.to(device)
        self.is_answer = None if self.is_answer is None else self.is_answer.to(device)

    def counts(self, reducer: DecoderReducer, drop: Drop, present: Tensor) -> tuple[Tensor, Tensor]:
        """[P] tokens of each pool that stay as they are, and [P] that others are merged into.

        Args:
            reducer: the method.
            drop: that it makes.
            present: [P] tokens of each pool that are still there.
        """
        kept = torch.maximum(reducer.kept(drop, self.sizes, present), self.least).minimum(present)
        return kept, reducer.merged(drop, present - kept)

    def ask(self, is_query: Tensor) -> None:
        """Let other tokens rank: [B, L] bool, text only. Their number is copied to the host."""
        is_query = is_query & (self.pool < 0)
        self.is_query, counts = is_query, is_query.sum(dim=1).cpu()
        self.queries = max(1, int(counts.max()))
        self.least = torch.where((counts > 0)[self.row], torch.zeros_like(self.sizes), self.sizes)

    def row_lengths(self, counts: Tensor) -> list[int]:
        """Real tokens of each row where the pools have `counts` tokens."""
        return self.others.index_add(0, self.row, counts).tolist()


def plan_pools(
    image_index: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    pool_of: str,
    left: bool | None = None,
    device: torch.device | None = None,
) -> Pools:
    """Find the pools and the queries of a batch, on the host.

    Args:
        image_index: [B, L] int64, of images, or of frames where they are the pools; -1 for text and padding.
        mask: [B, L] bool, real tokens.
        labels: [B, L] int64 or None; see `StagedPass`.
        pool_of: "image", "frame" or "sample".
        left: the side on which rows are padded; None: as they are, and on the left where there is no padding, so that
            they end alike and the next token is read off the last column.
        device: where the hidden states are; None: the host.
    """
    device = image_index.device if device is None else device
    b, real = len(image_index), mask
    image = image_index.masked_fill(~real, -1)
    is_image = image >= 0
    if pool_of != "sample":
        before = torch.cat([image.new_full((b, 1), -1), image[:, :-1]], dim=1)
        starts = is_image & (image != before)
        pool = starts.flatten().cumsum(0).view_as(image) - 1
        row = starts.nonzero()[:, 0]
    else:
        has_image = is_image.any(dim=1)
        pool = (has_image.cumsum(0) - 1).unsqueeze(1).expand_as(image)
        row = has_image.nonzero()[:, 0]
    pool = pool.masked_fill(~is_image, -1)
    # Rows without an image have nothing to rank.
    is_query = _queries(real, labels) & is_image.any(dim=1, keepdim=True)
    sizes = torch.bincount(pool[is_image], minlength=len(row))
    protected = torch.bincount(pool[is_image & is_query], minlength=len(row))
    return Pools(
        pool=to_device(pool, device),
        is_query=to_device(is_query, device),
        sizes=sizes,
        row=row,
        least=torch.where(is_query.any(dim=1)[row], protected, sizes),
        others=(real & ~is_image).sum(dim=1),
        queries=max(1, int(is_query.sum(dim=1).max())),
        left=bool(real[real.any(dim=1), -1].all()) if left is None else left,
        is_answer=None if labels is None else to_device((labels != IGNORE_INDEX) & real, device),
    )


def _queries(real: Tensor, labels: Tensor | None) -> Tensor:
    """[B, L] bool: the token before each answer; without labels the last token."""
    after = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
    if labels is None:
        return real & (after.flip(1).cumsum(1).flip(1) == 0)
    learnt = (labels != IGNORE_INDEX) & real
    learnt_after = torch.cat([learnt[:, 1:], torch.zeros_like(learnt[:, :1])], dim=1)
    return real & ~learnt & learnt_after


def keep_best(scores: Tensor, pool: Tensor, counts: Tensor, sizes: Tensor) -> Tensor:
    """Keep the best tokens of each pool; of equal ones, the earlier.

    Args:
        scores: [B, L] float32.
        pool: [B, L] int64, -1 for what is kept in any case.
        counts: [P] int64 on the host, how many to keep of each pool.
        sizes: [P] int64 on the host, how many of `pool` are of each.

    Returns:
        [B, L] bool.
    """
    flat, device = pool.flatten(), pool.device
    order = scores.flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # pool by pool (-1 first), the best first
    # Of each pool the place of its first token and how many to keep; of pool -1, which stands at the end, all.
    starts = flat.numel() - int(sizes.sum()) + sizes.cumsum(0) - sizes
    table = torch.nn.functional.pad(torch.stack([starts, counts]), (0, 1))
    table[1, -1] = flat.numel()
    starts, limit = to_device(table, device)
    place = torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=device))
    return (place - starts[flat] < limit[flat]).view_as(pool)


def pack_columns(keep: Tensor, lengths: list[int], left: bool) -> tuple[Tensor, Tensor]:
    """Close the gaps that dropped tokens leave.

    Args:
        keep: [B, L] bool.
        lengths: tokens kept in each row.
        left: pad on the left.

    Returns:
        Columns [B, L'] of the kept tokens in their order, 0 at padding; and [B, L'] bool, what is no padding.
    """
    b, old = keep.shape
    length = max(lengths)
    count = to_device(torch.tensor(lengths), keep.device).unsqueeze(1)
    shift = length - count if left else torch.zeros_like(count)
    target = torch.where(keep, keep.cumsum(1) - 1 + shift, length)
    columns = torch.zeros(b, length + 1, dtype=torch.int64, device=keep.device)
    columns.scatter_(1, target, torch.arange(old, device=keep.device).expand(b, -1))
    new = torch.arange(length, device=keep.device).expand(b, -1)
    return columns[:, :length], (new >= shift) & (new < shift + count)
