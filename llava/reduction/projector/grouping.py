"""What the projector's methods share: k x k neighbours become one cell, and a cell becomes one or several tokens.

Shapes: N images, P patches on a grid of h x w, k side of a group, P / k^2 cells, E tokens a cell, C vision width, D
language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.reduction.base import ProjectorReducer, VisionFeatures, VisualTokens
from llava.reduction.options import Count


class GroupingReducer(ProjectorReducer):
    """Fuses the hidden states it reads, groups neighbours and projects each group. A method overrides `group`."""

    is_trained = True
    kernel: Count = 2  # side k of the square of patches that becomes one cell

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """Sides that divide a square grid, the largest first."""
        side = math.isqrt(entering)
        return [{"kernel": k} for k in range(side, 0, -1) if side**2 == entering and side % k == 0]

    def reduced_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) patches as (h / k, w / k) cells."""
        k = self.kernel
        if grid[0] % k or grid[1] % k:
            fitting = [n for n in range(1, min(grid) + 1) if grid[0] % n == grid[1] % n == 0]
            raise ValueError(
                f"kernel={k} does not divide the vision tower's grid of {grid[0]} x {grid[1]} patches; set kernel to "
                f"one of {', '.join(map(str, fitting))}"
            )
        return grid[0] // k, grid[1] // k

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
        if vision.grid is None:
            raise ValueError("a projector that groups neighbours needs to know where they are: pass grid=(h, w)")
        grid = self.reduced_grid(vision.grid)
        features = vision.features
        if mm_projector_crosslayer is not None:
            features = run(mm_projector_crosslayer, concatenate_states(vision))
        tokens = run(mm_projector, self.group(features, vision.grid)).flatten(1, -2)
        n, m = tokens.shape[:2]
        cells = grid[0] * grid[1]
        source = torch.arange(cells).repeat_interleave(m // cells)
        return VisualTokens(tokens, source=source.expand(n, -1), grid=grid)


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
