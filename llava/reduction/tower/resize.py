"""Resize: run the vision tower on a smaller picture, the plainest way to fewer tokens.

Shapes: h x w the grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llava.reduction.base import TowerReducer
from llava.reduction.options import Count
from llava.reduction.registry import register


@register("resize")
class Resize(TowerReducer):
    """The picture enters the vision tower with `tokens` patches in place of all, on a grid of the same proportions.

    The pixels that the image processor made are resized, bicubic with antialias; a tile of anyres like a picture. The
    position embeddings are resized as transformers does with `interpolate_pos_encoding=True`. Tokens lie on a grid, so
    that a method after the tower or in the projector goes on from there. It follows no paper.
    """

    tokens: Count = 144  # of the smaller picture: a square number for a square tower

    keeps_grid = True

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """The grids of a square tower."""
        return [{"tokens": side * side} for side in range(1, math.isqrt(entering) + 1)]

    def input_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        smaller = [(side, max(1, round(side * columns / rows))) for side in range(1, rows + 1)]
        nearest = min(smaller, key=lambda sides: abs(math.prod(sides) - self.tokens))
        if math.prod(nearest) != self.tokens:
            raise self.mistake(
                f"tokens={self.tokens}: a picture of {rows} x {columns} patches has no smaller grid of so many; the "
                f"nearest has {math.prod(nearest)}, {nearest[0]} x {nearest[1]}"
            )
        return nearest
