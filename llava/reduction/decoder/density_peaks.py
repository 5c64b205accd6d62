"""DPC-kNN: groups of tokens around those that lie densest and far from denser ones.

Du et al., Study on density peaks clustering based on k-nearest neighbors, 2016; of tokens as in
https://arxiv.org/abs/2204.08680.
Shapes: P sets of tokens, M tokens of a set at most, C groups of a set at most, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.reduction.selection import at_least_float32, precise_product


def merge_by_density(tokens: Tensor, is_real: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Make one token of each group: the sum of its members by their number plus 1e-6.

    Args:
        tokens: [P, M, D].
        is_real: [P, M] bool, which are no padding; they come first.
        counts: [P] int64 on the host, groups of each set, no more than its tokens.

    Returns:
        The centre of each group, [P, C] int64, and its token, [P, C, D]. Those beyond `counts` mean nothing.
    """
    centres, group = density_peaks(tokens.detach(), is_real, counts)
    slots = torch.arange(centres.shape[1], device=tokens.device)
    member = ((group.unsqueeze(1) == slots.unsqueeze(1)) & is_real.unsqueeze(1)).to(tokens.dtype)  # [P, C, M]
    return centres, precise_product(member, tokens) / (member.sum(dim=2, keepdim=True) + 1e-6)


@torch.no_grad()
def density_peaks(tokens: Tensor, is_real: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of groups by falling density x distance, and the group of each token; see `merge_by_density`.

    The distance of two tokens is the Euclidean one by sqrt(D). Density is exp(-s), s the mean of the squared distances
    to the C nearest tokens, itself included; it is compared by s, as exp(-s) may be 0 for many. A token's own distance
    is the least one to a denser token; for the densest, the greatest distance of all.

    Returns:
        [P, C] int64, indices of tokens, and [P, M] int64, the group that each token belongs to.
    """
    values, most = at_least_float32(tokens), int(counts.max())
    counts = counts.to(tokens.device).unsqueeze(1)
    # Without products: those would round away the small distances, and a token would not be 0 from itself.
    far = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / values.shape[2] ** 0.5
    pairs = is_real.unsqueeze(1) & is_real.unsqueeze(2)
    slots = torch.arange(most, device=tokens.device)
    nearest = far.masked_fill(~pairs, torch.inf).topk(most, dim=2, largest=False).values
    is_slot = slots < counts
    spread = nearest.square().masked_fill(~is_slot.unsqueeze(1), 0).sum(dim=2) / counts.clamp(min=1)
    is_denser = (spread.unsqueeze(1) < spread.unsqueeze(2)) & pairs
    farthest = far.masked_fill(~pairs, 0).amax(dim=(1, 2)).unsqueeze(1)
    own = far.masked_fill(~is_denser, torch.inf).amin(dim=2).minimum(farthest)
    peak = (own.log() - spread).masked_fill(~is_real, -torch.inf)
    centres = peak.argsort(dim=1, descending=True, stable=True)[:, :most]
    to_centres = far.gather(2, centres.unsqueeze(1).expand(-1, far.shape[1], -1))
    group = to_centres.masked_fill(~is_slot.unsqueeze(1), torch.inf).argmin(dim=2)
    itself = torch.where(is_slot, slots, group.gather(1, centres))
    return centres, group.scatter(1, centres, itself)
