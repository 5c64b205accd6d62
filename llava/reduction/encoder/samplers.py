"""Baselines that choose patches without looking at them: sequential, spatial and random.

Paper: the ablation of LLaVA-PruMerge, https://arxiv.org/abs/2403.15388, section 4.4.1.
Shapes: N images, P patches, M kept tokens, C vision width; h x w the grid of patches.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reduction.base import EncoderReducer, VisionFeatures, VisualTokens
from llava.reduction.registry import register
from llava.reduction.selection import BudgetOptions, uniform_positions


@dataclass(kw_only=True)
class SamplerOptions(BudgetOptions):
    """Options of `sequential`: a budget, since nothing is measured that could set one."""

    def validate(self, method: str) -> None:
        super().validate(method)
        if not self.has_budget():
            raise ValueError(
                f"method '{method}' has no adaptive count: give it a budget, ratio=0.0625 or tokens=36, say"
            )

    def has_budget(self) -> bool:
        """Whether the options say how many patches to keep."""
        return self.ratio is not None or self.tokens is not None


@dataclass(kw_only=True)
class RandomOptions(SamplerOptions):
    """Options of `random`."""

    seed: int = 0  # of the choice, the same for every image


@dataclass(kw_only=True)
class SpatialOptions(SamplerOptions):
    """Options of `spatial`: rows and columns, or a budget."""

    rows: int | None = None  # rows to keep of the grid
    columns: int | None = None  # patches to keep of each of them

    def validate(self, method: str) -> None:
        super().validate(method)
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"method '{method}': {name}={value!r} must be a whole number, 1 or more")
        if (self.rows is None) != (self.columns is None):
            raise ValueError(f"method '{method}': rows and columns go together")
        if self.rows is not None and (self.ratio is not None or self.tokens is not None):
            raise ValueError(f"method '{method}': rows x columns is the budget; leave out ratio and tokens")

    def has_budget(self) -> bool:
        return super().has_budget() or self.rows is not None


class Sampler(EncoderReducer):
    """Keeps the same patches of every image, in raster order. A sampler overrides `choose`."""

    options: SamplerOptions

    @abc.abstractmethod
    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        """Indices of `count` patches of a grid of (h, w), [M] int64, rising; on the CPU."""

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] to [N, M, C]."""
        n, p = vision.features.shape[:2]
        grid = vision.grid if vision.grid is not None else (1, p)
        kept = self.choose(grid, self.options.fixed_count(p) or p).to(vision.features.device)
        return VisualTokens(vision.features[:, kept], source=kept.expand(n, -1))


@register("sequential")
class Sequential(Sampler):
    """Keep the first patches in raster order: the top of the image."""

    options_class = SamplerOptions

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        return torch.arange(count)


@register("random")
class Random(Sampler):
    """Keep patches drawn at random, the same for every image, so that a sample does not depend on its batch."""

    options_class = RandomOptions
    options: RandomOptions

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randperm(grid[0] * grid[1], generator=generator)[:count].sort().values


@register("spatial")
class Spatial(Sampler):
    """Keep the crossings of evenly spaced rows and columns.

    Given a budget in place of rows and columns, the grid that holds at most so many patches in about the picture's
    own proportions.
    """

    options_class = SpatialOptions
    options: SpatialOptions

    def choose(self, grid: tuple[int, int], count: int) -> Tensor:
        h, w = grid
        rows, columns = self.options.rows, self.options.columns
        if rows is None or columns is None:
            rows = min(h, count, max(1, round((count * h / w) ** 0.5)))
            columns = min(w, count // rows)
        if rows > h or columns > w:
            raise ValueError(f"method 'spatial': {rows} x {columns} patches do not fit the tower's grid of {h} x {w}")
        return (uniform_positions(rows, h).unsqueeze(1) * w + uniform_positions(columns, w)).flatten()
