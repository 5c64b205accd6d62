"""TokenPacker: coarse tokens take detail out of the patches that they stand for, of several blocks of the tower.

Paper: TokenPacker, Efficient Visual Projector for Multimodal LLM, https://arxiv.org/abs/2407.02392.
Shapes: N images, P patches on a grid of h x w, r side of a window, M = P / r^2 windows, C vision width, D
language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llava.reduction.base import VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.projector.attention import CrossAttention, head_count
from llava.reduction.projector.grouping import GridReducer, common_sides, grid_of
from llava.reduction.registry import register

LEVELS = (12, 16, 22, 23)  # blocks of CLIP-L, of which LLaVA selects 23
HEADS = 8
EPS = 1e-6


@register("tokenpacker")
class TokenPacker(GridReducer):
    """A token for each window of r x r patches: a query made of what lies in its middle attends to the window alone.

    Keys and values are made of the hidden states after blocks 12, 16, 22 and 23, side by side. These are counted for a
    tower whose selected block is 23; in another one they lie as far on the way to the selected block, rounded, and in
    a shallow one the same block may come twice.

    | step | paper | release | here |
    |---|---|---|---|
    | windows | 2 x 2, 3 x 3, 4 x 4 | the branch for LLaVA-1.5 has 2 x 2 | 2 x 2, 3 x 3, 4 x 4 |
    | levels | of CLIP-L | blocks 12, 16, 22 and 23, whatever is selected | counted up to the selected block |
    """

    is_trained = True
    scale: Literal[2, 3, 4] = 2  # side r of a window
    heads: Count | None = None  # of the attention; null: 8, or fewer in a tower of less than 64 channels

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """Scales that divide a square grid, the fewest tokens first."""
        side = math.isqrt(entering)
        return [{"scale": r} for r in (4, 3, 2) if side**2 == entering and side % r == 0]

    def side(self, grid: tuple[int, int]) -> int:
        if self.scale not in common_sides(grid):
            fitting = [str(r) for r in common_sides(grid) if r in (2, 3, 4)]
            raise self.mistake(
                f"scale={self.scale} does not divide the vision tower's grid of {grid[0]} x {grid[1]} patches; set "
                f"scale to one of {', '.join(fitting) or 'none: no scale does'}"
            )
        return self.scale

    def levels(self, selected: int) -> tuple[int, ...]:
        """The blocks whose outputs make keys and values, the selected one last."""
        return tuple((2 * level * selected + LEVELS[-1]) // (2 * LEVELS[-1]) for level in LEVELS)

    def blocks(self, depth: int, selected: int) -> tuple[int, ...]:
        """The selected block, whose output makes the queries, and the levels."""
        return (selected, *self.levels(selected))

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`mm_projector`, with the release's names inside."""
        heads = self.heads or head_count(vision_width, HEADS)
        if vision_width % heads:
            raise self.mistake(f"heads={heads} does not divide the {vision_width} channels of the vision tower")
        return {"mm_projector": WindowAttention(vision_width, width, heads)}

    def forward(self, vision: VisionFeatures, mm_projector: nn.Module) -> VisualTokens:
        """[N, P, C] patches in, [N, M, D] out, on the coarser grid.

        Raises:
            ValueError: no grid, one that `scale` does not divide, or no hidden states.
        """
        grid, states = grid_of(vision), vision.hidden_states
        if not states:
            raise self.mistake("it reads hidden states of the vision tower: pass hidden_states={block: ...}")
        multi = torch.cat([states[level] for level in self.levels(next(iter(states)))], dim=2)
        side = self.side(grid)
        queries = middle(patches_of_windows(vision.features, grid, side), side)
        return self.placed(mm_projector(queries, patches_of_windows(multi, grid, side)), grid)


class WindowAttention(nn.Module):
    """The modules of the release's projector.

    Args:
        c: vision width.
        d: language-model width.
        heads: of the attention.
    """

    def __init__(self, c: int, d: int, heads: int) -> None:
        super().__init__()
        self.q_proj_1 = nn.Linear(c, c, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(len(LEVELS) * c, c), nn.GELU(), nn.Linear(c, c))
        self.v_proj_1 = nn.Sequential(nn.Linear(len(LEVELS) * c, c), nn.GELU(), nn.Linear(c, c))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(c, eps=EPS) for _ in range(3))
        self.clip_attn = CrossAttention(c, heads)
        self.mlp = nn.Sequential(nn.Linear(c, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, queries: Tensor, multi: Tensor) -> Tensor:
        """[N, M, C] coarse features and [N, M, r^2, 4 C] levels of their windows to [N, M, D]."""
        dtype = self.q_proj_1.weight.dtype
        q = self.ln_q_1(self.q_proj_1(queries.to(dtype))).unsqueeze(2)
        multi = multi.to(dtype)
        attended = self.clip_attn(q, self.ln_k_1(self.k_proj_1(multi)), self.ln_v_1(self.v_proj_1(multi)))
        return self.mlp(attended.squeeze(2))


def patches_of_windows(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[N, P, C] as [N, M, r^2, C], the patches of each window in raster order."""
    n, _, c = features.shape
    h, w = grid
    squares = features.view(n, h // side, side, w // side, side, c)
    return squares.transpose(2, 3).reshape(n, (h // side) * (w // side), side * side, c)


def middle(squares: Tensor, side: int) -> Tensor:
    """[N, M, r^2, C] to [N, M, C]: what bilinear interpolation by 1 / r reads, the middle patch or the middle 2 x 2."""
    inner = slice((side - 1) // 2, side // 2 + 1)
    return squares.unflatten(2, (side, side))[:, :, inner, inner].mean(dim=(2, 3))
