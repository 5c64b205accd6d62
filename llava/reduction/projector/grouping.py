"""What the projector's methods share: k x k neighbours become one cell, and a cell becomes one or several tokens.

Shapes: N images, P patches on a grid of h x w, k side of a group, P / k^2 cells, E tokens a cell, C vision width, D
language-model width.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.reduction.base import ProjectorReducer, VisionFeatures, VisualTokens
from llava.reduction.options import Count


class GridReducer(ProjectorReducer):
    """k x k patches become a cell of a coarser grid. A method says how large k is."""

    @abc.abstractmethod
    def side(self, grid: tuple[int, int]) -> int:
        """k on a grid of (h, w) patches.

        Raises:
            ValueError: the options do not suit the grid.
        """

    def reduced_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) patches as (h / k, w / k) cells."""
        k = self.side(grid)
        return grid[0] // k, grid[1] // k

    def token_count(self, grid: tuple[int, int]) -> int:
        rows, columns = self.reduced_grid(grid)
        return rows * columns

    def placed(self, tokens: Tensor, grid: tuple[int, int]) -> VisualTokens:
        """The tokens of a cell are side by side; `source` is the cell."""
        rows, columns = self.reduced_grid(grid)
        n, m = tokens.shape[:2]
        source = torch.arange(rows * columns).repeat_interleave(m // (rows * columns))
        return VisualTokens(tokens, source=source.expand(n, -1), grid=(rows, columns))


def grid_of(vision: VisionFeatures) -> tuple[int, int]:
    """Rows and columns of the patches.

    Raises:
        ValueError: they are not known.
    """
    if vision.grid is None:
        raise ValueError("a projector that groups neighbours needs to know where they are: pass grid=(h, w)")
    return vision.grid


def common_sides(grid: tuple[int, int]) -> list[int]:
    """The sides of squares that divide a grid of (h, w), the smallest first."""
    return [k for k in range(1, min(grid) + 1) if grid[0] % k == grid[1] % k == 0]


class GroupingReducer(GridReducer):
    """Fuses the hidden states it reads, groups neighbours and projects each group. A method overrides `group`."""

    is_trained = True
    kernel: Count = 2  # side k of the square of patches that becomes one cell

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """Sides that divide a square grid, the largest first."""
        side = math.isqrt(entering)
        return [{"kernel": k} for k in range(side, 0, -1) if side**2 == entering and side % k == 0]

    def side(self, grid: tuple[int, int]) -> int:
        """`kernel`, where it divides the grid."""
        if self.kernel not in common_sides(grid):
            raise ValueError(
                f"kernel={self.kernel} does not divide the vision tower's grid of {grid[0]} x {grid[1]} patches; set "
                f"kernel to one of {', '.join(map(str, common_sides(grid)))}"
            )
        return self.kernel

    def group(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, P, C] patches on a grid of (h, w) as what enters the projector, [N, P / k^2, any width]."""
        return concatenate_neighbours(features, grid, self.kernel)

    def forward(
        self, vision: VisionFeatures, mm_projector: nn.Module, mm_projector_crosslayer: nn.Module | None = None
    ) -> VisualTokens:
        """[N, P, C] patches in, [N, P / k^2 * E, D] tokens out, a cell's E tokens side by side.

        Args:
            vision: with `grid`, and with `hidden_states` where the method fuses blocks.
            mm_projector: [N, P / k^2, any] to [N, P / k^2, D] or [N, P / k^2, E, D].
            mm_projector_crosslayer: [N, P, M * C] to [N, P, C], the fusion of M hidden states; None: there is none.

        Returns:
            Tokens whose `source` is the cell they stand for, on the reduced grid.

        Raises:
            ValueError: no grid, or one that k does not divide; or no hidden states to fuse.
        """
        grid = grid_of(vision)
        self.side(grid)
        features = vision.features
        if mm_projector_crosslayer is not None:
            features = run(mm_projector_crosslayer, concatenate_states(vision))
        return self.placed(run(mm_projector, self.group(features, grid)).flatten(1, -2), grid)


def run(module: nn.Module, features: Tensor) -> Tensor:
    """Apply a module in the dtype of its weights, which in training may be a wider one than the tower's."""
    weight = next(module.parameters(), None)
    return module(features if weight is None else features.to(weight.dtype))


def concatenate_states(vision: VisionFeatures) -> Tensor:
    """The hidden states side by side in their order, [N, P, M * C]."""
    if not vision.hidden_states:
        raise ValueError("this projector fuses hidden states of the vision tower: pass hidden_states={block: ...}")
    return torch.cat(list(vision.hidden_states.values()), dim=2)


def concatenate_neighbours(features: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """k x k neighbours side by side, [N, P, C] to [N, P / k^2, C * k^2].

    Channels run outermost, then rows, then columns, as in the weight of a convolution: a linear layer on the result is
    a k x k convolution of stride k.
    """
    n, _, c = features.shape
    h, w = grid
    squares = features.view(n, h // k, k, w // k, k, c)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(n, (h // k) * (w // k), c * k * k)


def average_neighbours(features: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """The mean of k x k neighbours, [N, P, C] to [N, P / k^2, C]."""
    n, _, c = features.shape
    h, w = grid
    return features.view(n, h // k, k, w // k, k, c).mean(dim=(2, 4)).flatten(1, 2)
