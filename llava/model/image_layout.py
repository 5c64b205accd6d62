"""Which visual tokens of an image enter the language model, and in which order.

An image is one tile, or (anyres) a small view of the whole followed by the tiles of the enlarged image. The layout is
computed on the CPU as indices into the tokens of all tiles, so that one gather builds the sequence of the whole batch.

Shapes: T tiles of one image, M tokens a tile, h x w patches a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.mm_utils import get_anyres_image_grid_shape

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
"""Allowed values of `mm_patch_merge_type`."""

NEWLINE = -1  # index that stands for the learned newline token


@dataclass(frozen=True)
class LayoutSpec:
    """How tiles are put together.

    Attributes:
        merge_type: `mm_patch_merge_type`, one of `MERGE_TYPES`.
        grid: (h, w), patches of one tile, or cells where the projector fuses patches.
        tile_size: side of a tile in pixels.
        pinpoints: `image_grid_pinpoints`, the (width, height) that anyres may choose; None without anyres.
    """

    merge_type: str
    grid: tuple[int, int]
    tile_size: int
    pinpoints: list | str | None = None

    def __post_init__(self) -> None:
        if self.merge_type not in MERGE_TYPES:
            raise ValueError(f"mm_patch_merge_type={self.merge_type!r}: choose one of {', '.join(MERGE_TYPES)}")


def image_layout(source: Tensor, mask: Tensor, image_size: tuple[int, int] | None, spec: LayoutSpec) -> Tensor:
    """Order the tokens of one image.

    Flat: tile after tile, each in its own order. Spatial: the first tile in its own order, then the tokens of the
    others in raster order over the enlarged picture, then their aggregates (`source` -1), tile by tile. With unpad,
    tokens on the border that only pads the picture are dropped, and a newline token ends each row that still holds a
    token, the row of aggregates included. A picture thinner than a patch has newlines only.

    Args:
        source: [T, M] int64, the patch (or cell) each token came from, -1 for an aggregate. Tokens of one patch stay
            together, in their order.
        mask: [T, M] bool, real tokens.
        image_size: (width, height) of the original picture in pixels; needed for several tiles, unless flat.
        spec: how to lay out.

    Returns:
        [K] int64, flat indices into [T, M], or NEWLINE.

    Raises:
        ValueError: the number of tiles does not fit the picture's size.
    """
    tokens = torch.arange(source.numel()).view(source.shape)
    if spec.merge_type == "flat":
        return tokens[mask]
    unpad = spec.merge_type == "spatial_unpad"
    first = tokens[0][mask[0]]
    if source.shape[0] == 1:
        return torch.cat([first, torch.tensor([NEWLINE])]) if unpad else first
    tiles = _tiles(source.shape[0], image_size, spec)
    rest = _raster(source[1:], mask[1:], tokens[1:], tiles, image_size if unpad else None, spec.grid)
    return torch.cat([first, rest])


def _tiles(count: int, image_size: tuple[int, int] | None, spec: LayoutSpec) -> tuple[int, int]:
    """Columns and rows of tiles of the enlarged picture."""
    if image_size is None or spec.pinpoints is None:
        raise ValueError(
            f"an image of {count} tiles with mm_patch_merge_type={spec.merge_type} needs image_sizes=[(width, height), "
            "...] and image_grid_pinpoints in the model's config"
        )
    columns, rows = get_anyres_image_grid_shape(image_size, spec.pinpoints, spec.tile_size)
    if 1 + columns * rows != count:
        raise ValueError(
            f"an image of size {tuple(image_size)} (width, height) makes 1 + {columns} x {rows} tiles under this "
            f"model's image_grid_pinpoints, but {count} were given; check image_sizes and the preprocessing"
        )
    return columns, rows


def _raster(
    source: Tensor,
    mask: Tensor,
    tokens: Tensor,
    tiles: tuple[int, int],
    image_size: tuple[int, int] | None,
    grid: tuple[int, int],
) -> Tensor:
    """Order tokens by row and column of the enlarged picture; unpad and add newlines where `image_size` is given."""
    h, w = grid
    columns, rows = tiles
    tile = torch.arange(source.shape[0]).unsqueeze(1)
    y = tile // columns * h + source.clamp(min=0) // w
    x = tile % columns * w + source.clamp(min=0) % w
    aggregate = source < 0
    y = torch.where(aggregate, rows * h, y)  # one row below the picture, in the order of the tiles
    x = torch.where(aggregate, torch.arange(source.numel()).view(source.shape), x)
    keep = mask
    if image_size is not None:
        top, bottom, left, right = unpadded_box(columns * w, rows * h, image_size)
        keep = mask & (aggregate | (y >= top) & (y < bottom) & (x >= left) & (x < right))
    width = max(columns * w, source.numel()) + 1
    position, index = (y * width + x)[keep], tokens[keep]
    if image_size is not None:
        ends = torch.unique(y[keep])
        if left == right:  # of a picture thinner than a patch, LLaVA keeps the newlines
            ends = torch.cat([torch.arange(top, bottom), ends])
        ends = ends * width + width - 1
        position = torch.cat([position, ends])
        index = torch.cat([index, torch.full_like(ends, NEWLINE)])
    return index[position.argsort(stable=True)]


def unpadded_box(columns: int, rows: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a padded grid that shows the picture: top, bottom, left, right, in patches.

    Args:
        columns: width of the grid, in patches (or cells).
        rows: height of the grid, in patches (or cells).
        image_size: (width, height) of the original picture in pixels.
    """
    width, height = image_size
    # Rounding to seven digits first, as transformers does: 23.9999999 patches are 24.
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return border, rows - border, 0, columns
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, border, columns - border


def padded_patches(image_size: tuple[int, int], side: int, grid: tuple[int, int]) -> Tensor:
    """[h * w] bool, the patches of a padded square that show nothing of the picture.

    Args:
        image_size: (width, height) of the original picture in pixels.
        side: of the square, in pixels.
        grid: (h, w), patches of the square.
    """
    width, height = image_size
    shown = round(min(image_size) * side / max(image_size))
    before = (side - shown) // 2
    after = side - shown - before
    cells = grid[0] if width >= height else grid[1]
    patch = side // cells
    line = torch.arange(cells)
    is_padding = (line < before // patch) | (line >= cells - after // patch)
    square = is_padding.unsqueeze(1) if width >= height else is_padding.unsqueeze(0)
    return square.expand(grid).flatten()
