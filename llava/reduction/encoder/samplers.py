"""Baselines that choose patches without looking at them: sequential, spatial and random.

Paper: the ablation of LLaVA-PruMerge, https://arxiv.org/abs/2403.15388, section 4.4.1.
Shapes: N images, P patches, M kept tokens, C vision width; h x w the grid of patches.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from llava.reduction.base import VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.registry import register
from llava.reduction.selection import BudgetedReducer, uniform_positions
from llava.transfer import to_device


class Sampler(BudgetedReducer):
    """Keeps the same patches of every image, in raster order. A sampler overrides `choose`."""

    def validate(self) -> None:
        super().validate()
        if self.is_adaptive:  # nothing is measured that could set a count
            raise self.mistake("there is no adaptive count: give it a budget, ratio=0.0625 or tokens=36, say")

    @abc.abstractmethod
    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        """Indices of `count` patches of a grid of (h, w), [M] int64, in rising order; on the CPU."""

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C]."""
        n, p = vision.features.shape[:2]
        grid = vision.grid if vision.grid is not None else (1, p)
        kept = self.choose(grid, self.fixed_count(p) or p)
        features = vision.features.index_select(1, to_device(kept, vision.features.device))
        return VisualTokens(features, source=kept.expand(n, -1))


@register("sequential")
class Sequential(Sampler):
    """Keep the first patches in raster order: the top of the image."""

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        return torch.arange(count)


@register("random")
class Random(Sampler):
    """Keep patches drawn at random, the same for every image, so that a sample does not depend on its batch."""

    seed: int = 0  # of the choice

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(grid[0] * grid[1], generator=generator)[:count].sort().values


@register("spatial")
class Spatial(Sampler):
    """Keep the crossings of evenly spaced rows and columns.

    Given a budget in place of rows and columns, the grid that holds at most so many patches in about the picture's
    own proportions.
    """

    budget_conflicts = ("ratio", "rows", "columns")

    rows: Count | None = None  # of the grid, to keep
    columns: Count | None = None  # patches to keep of each of them

    def validate(self) -> None:
        super().validate()
        if (self.rows is None) != (self.columns is None):
            raise self.mistake("rows and columns go together")
        if self.rows is not None and (self.ratio is not None or self.tokens is not None):
            raise self.mistake("rows x columns is the budget; leave out ratio and tokens")

    @property
    def is_adaptive(self) -> bool:
        return super().is_adaptive and self.rows is None

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        h, w = grid
        rows, columns = self.rows, self.columns
        if rows is None or columns is None:
            rows = min(h, count, max(1, round((count * h / w) ** 0.5)))
            columns = min(w, count // rows)
        if rows > h or columns > w:
            raise self.mistake(f"{rows} x {columns} patches do not fit the tower's grid of {h} x {w}")
        return (uniform_positions(rows, h).unsqueeze(1) * w + uniform_positions(columns, w)).flatten()
