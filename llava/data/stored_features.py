"""Pictures of a batch as the features that the projector reads, in place of their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """What the vision tower, and a method after it, made of some pictures.

    Only `tokens` goes to the device. What says where they belong stays on the host, where it is read.

    Attributes:
        tokens: [K, C], the tokens of all tiles one after the other, without padding; or [K, B, C], the B blocks of the
            tower that a method in the projector fuses.
        lengths: tokens of each tile.
        tiles: tiles of each picture.
        source: [K] int64, see `llava.reduction.base.VisualTokens`; None where token i of a tile is patch i.
        grid: (h, w), where `source` counts cells of a coarser grid than the patches'.
    """

    tokens: Tensor
    lengths: list[int]
    tiles: list[int]
    source: Tensor | None = None
    grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        """How many pictures these are."""
        return len(self.tiles)

    def to(self, device: Any, non_blocking: bool = False) -> StoredFeatures:
        """The same, with the tokens on a device: what accelerate calls."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StoredFeatures:
        """The same in pinned memory: what torch's data loader calls."""
        return replace(self, tokens=self.tokens.pin_memory())

    def split(self) -> list[StoredFeatures]:
        """One for each picture."""
        parts, tile, token = [], 0, 0
        for tiles in self.tiles:
            lengths = self.lengths[tile : tile + tiles]
            rows = slice(token, token + sum(lengths))
            source = None if self.source is None else self.source[rows]
            parts.append(replace(self, tokens=self.tokens[rows], lengths=lengths, tiles=[tiles], source=source))
            tile, token = tile + tiles, rows.stop
        return parts

    def blank(self, patches: int) -> StoredFeatures:
        """A picture of so many tokens that are zero, for a batch without one."""
        tokens = self.tokens.new_zeros(patches, *self.tokens.shape[1:])
        return replace(self, tokens=tokens, lengths=[patches], tiles=[1], source=None)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Which tokens are real [T, M] bool, and where each came from [T, M] int64, for T tiles of up to M tokens."""
        length = torch.tensor(self.lengths).unsqueeze(1)
        column = torch.arange(max(self.lengths))
        mask = column < length
        if self.source is None:
            return mask, column.expand_as(mask)
        return mask, torch.full(mask.shape, -1).masked_scatter(mask, self.source)


def join_features(parts: Sequence[StoredFeatures]) -> StoredFeatures:
    """The pictures of several, in order; at least one is given, which may hold none."""
    with_source = [part.source for part in parts if part.source is not None]
    return StoredFeatures(
        tokens=torch.cat([part.tokens for part in parts]),
        lengths=[length for part in parts for length in part.lengths],
        tiles=[tiles for part in parts for tiles in part.tiles],
        source=torch.cat(with_source) if with_source else None,
        grid=parts[0].grid,
    )


def join_images(images: Sequence[Any]) -> Any:
    """The images of the samples of a batch as the model takes them.

    Args:
        images: of each sample, a list of pixels or `StoredFeatures`.

    Returns:
        `StoredFeatures`; or one tensor where all pixels are of one shape, so that they are copied to the device at
        once; otherwise a list of tensors.
    """
    if images and all(isinstance(one, StoredFeatures) for one in images):
        return join_features(images)
    pixels = [image for one in images for image in one]
    return torch.stack(pixels) if pixels and all(p.shape == pixels[0].shape for p in pixels) else pixels
