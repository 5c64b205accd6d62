"""Where merged tokens go among those that stay: index arithmetic of the staged runner, for methods that merge.

Shapes: B rows, L tokens a row, P pools of image tokens, M merged tokens of a pool at most, W columns that a row gets
for its pools' merged tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.language_model.drop_plan import Pools
from llava.reduction.base import MergedTokens
from llava.transfer import to_device


@dataclass
class MergedRows:
    """Rows with further columns at their end, one for each merged token.

    Attributes:
        order: [B, L + W] int64, all columns in the order of the result: merged tokens after their pool.
        stays: [B, L + W] bool, of the columns in that order, those that the result has.
        stands_in: [B, L + W] int64, the old column in whose place each column stands; itself for an old one.
        index: row [P, M] and column [P, M] of each merged token.
        width: W.
    """

    order: Tensor
    stays: Tensor
    stands_in: Tensor
    index: tuple[Tensor, Tensor]
    width: int

    def extend(self, hidden: Tensor, features: Tensor) -> Tensor:
        """[B, L, D] with the merged tokens [P, M, D] in their columns, [B, L + W, D]."""
        extended = torch.cat([hidden, hidden.new_zeros(len(hidden), self.width, hidden.shape[-1])], dim=1)
        return extended.index_put(self.index, features.to(hidden))


def plan_merged(merged: MergedTokens, counts: Tensor, keep: Tensor, pool: Tensor, pools: Pools) -> MergedRows:
    """Give each merged token a column, and all columns an order.

    Args:
        merged: what the method returned.
        counts: [P] on the host, merged tokens of each pool.
        keep: [B, L] bool, tokens that stay as they are.
        pool: [B, L] int64, -1 outside of pools.
        pools: of the batch.
    """
    device, (b, length) = keep.device, keep.shape
    slots = torch.arange(merged.columns.shape[1])
    nth = torch.arange(len(pools.row)) - torch.searchsorted(pools.row, pools.row)  # of the pools of its row
    width = int(nth.max() + 1) * len(slots)
    place = to_device(length + nth.unsqueeze(1) * len(slots) + slots, device)
    index = (to_device(pools.row, device).unsqueeze(1).expand_as(place), place)
    column = torch.arange(length, device=device).expand(b, -1)
    empty = column.new_zeros(b, width)
    last = column.new_zeros(len(pools.row)).scatter_reduce(
        0, pool.clamp(min=0).flatten(), column.masked_fill(pool < 0, 0).flatten(), "amax"
    )
    step, slots = 1 + len(slots), to_device(slots, device)
    key = torch.cat([column * step, empty], dim=1).index_put(index, last.unsqueeze(1) * step + 1 + slots)
    order = key.argsort(dim=1, stable=True)
    is_real = slots < to_device(counts, device).unsqueeze(1)
    stays = torch.cat([keep, empty.bool()], dim=1).index_put(index, is_real)
    stands_in = torch.cat([column, empty], dim=1).index_put(index, merged.columns.to(device))
    return MergedRows(order, stays.gather(1, order), stands_in, index, width)
