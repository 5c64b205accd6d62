"""DPC-kNN: groups of tokens around those that lie densest and far from denser ones.

Du et al., Study on density peaks clustering based on k-nearest neighbors, 2016; of tokens as in
https://arxiv.org/abs/2204.08680.
Shapes: P sets of tokens, M tokens of a set at most, C groups of a set at most, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.reduction.selection import at_least_float32, precise_product
from llava.transfer import to_device


def merge_by_density(tokens: Tensor, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Make one token of each group: the sum of its members by their number plus 1e-6.

    Args:
        tokens: [P, M, D].
        lengths: [P] int64 on the host, tokens of each set, which come first.
        counts: [P] int64 on the host, groups of each set, no more than its tokens.

    Returns:
        The centre of each group, [P, C] int64, and its token, [P, C, D]. Those beyond `counts` mean nothing.
    """
    centres, group = density_peaks(tokens.detach(), lengths, counts)
    slots = torch.arange(centres.shape[1], device=tokens.device)
    member = at_least_float32((group.unsqueeze(1) == slots.unsqueeze(1)).to(tokens.dtype))  # [P, C, M]
    return centres, precise_product(member, tokens) / (member.sum(dim=2, keepdim=True) + 1e-6)


@torch.no_grad()
def density_peaks(tokens: Tensor, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of groups by falling density x distance, and the group of each token; see `merge_by_density`.

    The distance of two tokens is the Euclidean one by sqrt(D). Density is exp(-s), s the mean of the squared distances
    to the C nearest tokens, itself included; it is compared by s, as exp(-s) may be 0 for many. A token's own distance
    is the least one to a denser token; for the densest, the greatest distance of all.

    Returns:
        [P, C] int64, indices of tokens, and [P, M] int64, the group that each token belongs to; -1 at padding.
    """
    device, values, most = tokens.device, at_least_float32(tokens), int(counts.max())
    is_real = to_device(torch.arange(tokens.shape[1]) < lengths.unsqueeze(1), device)
    is_group = to_device(torch.arange(most) < counts.unsqueeze(1), device)
    # Without products: those would round away the small distances, and a token would not be 0 from itself.
    far = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / values.shape[2] ** 0.5
    pairs = is_real.unsqueeze(1) & is_real.unsqueeze(2)
    nearest = far.masked_fill(~pairs, torch.inf).topk(most, dim=2, largest=False).values
    spread = nearest.square().masked_fill(~is_group.unsqueeze(1), 0).sum(dim=2) / is_group.sum(dim=1, keepdim=True)
    is_denser = (spread.unsqueeze(1) < spread.unsqueeze(2)) & pairs
    farthest = far.masked_fill(~pairs, 0).amax(dim=(1, 2)).unsqueeze(1)
    own = far.masked_fill(~is_denser, torch.inf).amin(dim=2).minimum(farthest)
    centres = _highest(own.log() - spread, lengths, counts)
    to_centres = far.gather(2, centres.unsqueeze(1).expand(-1, far.shape[1], -1))
    group = to_centres.masked_fill(~is_group.unsqueeze(1), torch.inf).argmin(dim=2).masked_fill(~is_real, -1)
    place = centres.masked_fill(~is_group, group.shape[1])  # padding goes to a place of its own
    numbers = torch.arange(most, device=device).expand_as(centres)
    return centres, pad(group, (0, 1)).scatter(1, place, numbers)[:, :-1]


def _highest(peaks: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """The highest of each set by falling peak, [P, C] int64.

    Two groups always begin with a tie, the two tokens nearest to each other. The release leaves it to topk, whose order
    then depends on how many there are: so each set is asked for by itself.
    """
    highest = peaks.new_zeros(len(peaks), int(counts.max()), dtype=torch.int64)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        highest[row, :count] = peaks[row, :length].topk(count).indices
    return highest
