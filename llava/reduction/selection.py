"""Tensor operations that the methods share. All are vectorised over images and tokens.

Shapes: N images, P patches, M kept tokens, C vision width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_counts(descending: Tensor) -> Tensor:
    """How many scores of each row lie above the upper fence Q3 + 1.5 (Q3 - Q1).

    Quartiles interpolate linearly, as numpy.percentile does. Rows without an outlier count 1, so that every image
    keeps a token.

    Args:
        descending: [N, P] float32 scores, each row sorted from the highest.

    Returns:
        [N] int64, at least 1 each.
    """
    q3, q1 = _quantile(descending, 0.75), _quantile(descending, 0.25)
    fence = q3 + 1.5 * (q3 - q1)
    return (descending > fence).sum(dim=1).clamp(min=1)


def _quantile(descending: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of sorted scores, [N, 1]."""
    position = (1 - q) * (descending.shape[1] - 1)
    low = int(position)
    high = min(low + 1, descending.shape[1] - 1)
    return torch.lerp(descending[:, low : low + 1], descending[:, high : high + 1], position - low)


def nearest_neighbours(keys: Tensor, kept: Tensor, k: int) -> Tensor:
    """For each kept patch, the k patches whose keys have the highest cosine with its own, itself excluded.

    Args:
        keys: [N, P, C].
        kept: [N, M] int64, indices of patches.
        k: neighbours a patch; cut to P - 1.

    Returns:
        [N, M, k] int64, indices of patches.
    """
    p, c = keys.shape[1:]
    centres = keys.gather(1, kept.unsqueeze(-1).expand(-1, -1, c))
    # Cosines up to the length of the kept patch's own key, which does not change the order along its row. Scaling the
    # products, not the keys, spares a pass over all keys.
    lengths = torch.linalg.vector_norm(keys, dim=2, dtype=torch.promote_types(keys.dtype, torch.float32))
    similarity = (centres @ keys.transpose(1, 2)) / lengths.clamp(min=1e-12).unsqueeze(1)
    similarity.scatter_(2, kept.unsqueeze(-1), float("-inf"))
    return similarity.topk(min(k, p - 1), dim=2, sorted=False).indices
