"""M3: one model for several numbers of visual tokens, of which inference chooses one.

Paper: Matryoshka Multimodal Models, https://arxiv.org/abs/2405.17430.
Shapes: N images, P patches on a grid of h x w, k side of a square of patches, C vision width, D language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from llava.reduction.base import ProjectorReducer, VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.projector.grouping import GridReducer, average_neighbours, common_sides, grid_of, run
from llava.reduction.registry import register

KERNELS = (24, 8, 4, 2, 1)  # of 1, 9, 36, 144 and 576 tokens on a grid of 24 x 24


@register("m3")
class M3(GridReducer):
    """The plain projector on all patches, then the mean of k x k neighbours: k^2 = P / `tokens`.

    In training each batch goes through the language model once for every number in `scales`, and the loss is the mean
    of theirs. The choice of `tokens` is for inference, where any call may make another: `reduction={"name": "m3",
    "tokens": 36}`. Weights are those of LLaVA, so that any LLaVA can be tried, and M3's checkpoints run as LLaVA.

    | step | paper | release | here |
    |---|---|---|---|
    | number of tokens | 1, 9, 36, 144, 576 | any: `int(sqrt(P / tokens))` is the side k, so that 100 gives 144 tokens | only one that is given exactly: the squares that divide the grid |
    | vision tower in training | - | runs once a scale | runs once a step: the same loss and gradients |
    | what is trained | projector and language model | its script unfreezes the vision tower too | the recipe is the script's |
    """  # noqa: E501

    is_trained = True
    tokens: Count | None = None  # tokens of a tile; null: all patches
    scales: list[Count] | None = None  # tokens to train; null: `tokens`, or where they are null too, 1, 9, 36, 144, 576

    def validate(self) -> None:
        super().validate()
        if self.scales is not None and (not self.scales or len(set(self.scales)) < len(self.scales)):
            raise self.mistake(f"scales={self.scales!r} must be a list of different numbers such as [1, 9, 36]")

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """Numbers that a square grid can be pooled to, the fewest first."""
        side = math.isqrt(entering)
        fitting = common_sides((side, side)) if side**2 == entering else []
        return [{"tokens": entering // k**2} for k in reversed(fitting)]

    def side(self, grid: tuple[int, int]) -> int:
        patches = grid[0] * grid[1]
        sides = {patches // k**2: k for k in common_sides(grid)}
        odd = [count for count in (self.tokens or patches, *(self.scales or ())) if count not in sides]
        if odd:
            raise self.mistake(
                f"{grid[0]} x {grid[1]} patches can't be pooled to {', '.join(map(str, odd))} tokens; choose among "
                f"{', '.join(map(str, sorted(sides)))}"
            )
        return sides[self.tokens or patches]

    def in_training(self, grid: tuple[int, int], draw: int) -> Sequence[ProjectorReducer]:
        """This method at each of its scales."""
        if self.scales is None and self.tokens is not None:
            return (self,)
        sides = common_sides(grid)
        scales = self.scales or [grid[0] * grid[1] // k**2 for k in KERNELS if k in sides]
        return [self.trained_like(tokens=scale) for scale in scales]

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`mm_projector` alone, LLaVA's."""
        return {"mm_projector": plain(vision_width)}

    def forward(self, vision: VisionFeatures, mm_projector: nn.Module) -> VisualTokens:
        """[N, P, C] patches in, [N, `tokens`, D] out, on the coarser grid."""
        grid = grid_of(vision)
        k = self.side(grid)
        return self.placed(average_neighbours(run(mm_projector, vision.features), grid, k), grid)
