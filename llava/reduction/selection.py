"""What the methods after the tower share: a budget, and tensor operations, vectorised over images and tokens.

Shapes: N images, P patches, M kept tokens, C vision width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.reduction.base import EncoderReducer, VisualTokens
from llava.reduction.options import Count, Fraction


class BudgetedReducer(EncoderReducer):
    """Keeps as many patches as are outliers (neither option), a fraction of them, or a number."""

    ratio: Fraction | None = None  # of the patches: int(P * ratio) are kept
    tokens: Count | None = None  # patches to keep; aggregates that a method appends come on top

    def validate(self) -> None:
        super().validate()
        if self.ratio is not None and self.tokens is not None:
            raise self.mistake("ratio and tokens both say how many patches to keep; leave one out")

    @property
    def is_adaptive(self) -> bool:
        """Whether each image's own scores say how many patches it keeps."""
        return self.ratio is None and self.tokens is None

    def fixed_count(self, patches: int) -> int | None:
        """Patches to keep of `patches`, at least 1; None where the count is adaptive."""
        if self.tokens is not None:
            return min(self.tokens, patches)
        return None if self.ratio is None else max(1, int(patches * self.ratio))

    def kept_counts(self, descending: Tensor) -> Tensor:
        """Patches to keep of each image, [N] int64.

        Args:
            descending: [N, P] float32 scores, each row sorted from the highest; without a budget the outliers are kept.
        """
        n, p = descending.shape
        fixed = self.fixed_count(p)
        return outlier_counts(descending) if fixed is None else torch.full((n,), fixed, device=descending.device)


def on_host(counts: Tensor, fixed: int | None) -> list[int]:
    """`counts` [N] on the host; only where they are not the same `fixed` number is the device waited for."""
    return counts.tolist() if fixed is None else [fixed] * len(counts)


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


def take_rows(features: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, M] of `features` [N, P, C], as [N, M, C]."""
    return features.gather(1, index.unsqueeze(-1).expand(-1, -1, features.shape[2]))


def take_in_raster_order(features: Tensor, is_kept: Tensor, lengths: list[int] | None = None) -> VisualTokens:
    """The patches of `features` [N, P, C] that `is_kept` [N, P] bool marks, as they are.

    Args:
        features: [N, P, C].
        is_kept: [N, P] bool.
        lengths: how many each row of `is_kept` marks, where the host knows it.
    """
    n, p, _ = features.shape
    lengths = on_host(is_kept.sum(dim=1), None) if lengths is None else lengths
    patch = torch.arange(p, device=features.device).expand(n, p)
    source = patch.masked_fill(~is_kept, p).sort(dim=1).values[:, : max(lengths)]
    mask = source < p
    tokens = take_rows(features, source.clamp(max=p - 1))
    return VisualTokens(tokens * mask.unsqueeze(-1), mask, source.masked_fill(~mask, -1), lengths=lengths)


def take_sorted(features: Tensor, chosen: Tensor) -> VisualTokens:
    """The patches `chosen` [N, M] int64, all distinct, of `features` [N, P, C], in raster order."""
    source = chosen.sort(dim=1).values
    return VisualTokens(take_rows(features, source), source=source)


def at_least_float32(values: Tensor) -> Tensor:
    """In float32, or float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def precise_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or float64 where one of them is: what ranks must not be rounded to 16 bits by autocast."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def mean_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Softmax attention [N, H, S] float32 of queries [N, Q, C] to keys [N, S, C], head by head, the mean over queries.

    Scores of one head are there at a time, for what all take in memory.
    """
    width, rows = keys.shape[2] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = precise_product(queries[:, :, part], keys[:, :, part].transpose(1, 2)) * width**-0.5
        rows.append(logits.softmax(dim=2, dtype=torch.float32).mean(dim=1))
    return torch.stack(rows, dim=1)


def uniform_positions(count: int, length: int) -> Tensor:
    """The middles of `count` equal parts of 0, 1, ..., length - 1: [count] int64, distinct if count <= length."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def nearest_neighbours(
    keys: Tensor, kept: Tensor, k: int, excluded: Tensor | None = None, repeated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each kept patch, the k patches whose keys have the highest cosine with its own, itself left out.

    Args:
        keys: [N, P, C].
        kept: [N, M] int64, indices of patches.
        k: neighbours a patch; cut to P - 1.
        excluded: [N, P] bool, patches that are nobody's neighbour; None: there are none.
        repeated: [N, M] bool, slots whose patch stands in `kept` before. Each is a candidate of its own beside the
            patch; None: there are none.

    Returns:
        Indices of patches [N, M, k] int64, and whether each is a neighbour [N, M, k] bool: False where there are fewer
        than k candidates.
    """
    n, m = kept.shape
    p, c = keys.shape[1:]
    centres = keys.gather(1, kept.unsqueeze(-1).expand(-1, -1, c))
    # The length of the kept patch's own key does not change the order along its row. Scaling the products, not the
    # keys, spares a pass over all keys.
    lengths = torch.linalg.vector_norm(keys, dim=2, dtype=torch.promote_types(keys.dtype, torch.float32))
    similarity = precise_product(centres, keys.transpose(1, 2)) / lengths.clamp(min=1e-12).unsqueeze(1)
    columns = torch.arange(p, device=kept.device).expand(n, p)
    if repeated is not None:
        again = similarity.gather(2, kept.unsqueeze(1).expand(-1, m, -1))
        again.masked_fill_(~repeated.unsqueeze(1), float("-inf"))
    similarity.scatter_(2, kept.unsqueeze(-1), float("-inf"))
    if excluded is not None:
        similarity.masked_fill_(excluded.unsqueeze(1), float("-inf"))
    if repeated is not None:
        similarity, columns = torch.cat([similarity, again], dim=2), torch.cat([columns, kept], dim=1)
    best = similarity.topk(min(k, p - 1), dim=2, sorted=False)
    return columns.unsqueeze(1).expand(-1, m, -1).gather(2, best.indices), best.values.isfinite()
