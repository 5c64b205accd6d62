"""AvgPool and TokenConcat, the baselines of STF: neighbours become one token without a fusion of their own.

Paper: Learning Compact Vision Tokens for Efficient Large Multimodal Models, https://arxiv.org/abs/2506.07138,
section 4.3.3 and Table 5.
Shapes: N images, P patches, k side of a group, C vision width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from llava.reduction.projector.grouping import GroupingReducer, average_neighbours
from llava.reduction.registry import register


@register("avgpool")
class AvgPool(GroupingReducer):
    """The mean of k x k neighbours, then the projector of `mm_projector_type`, whose weights are the plain ones."""

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`mm_projector` alone, from C."""
        return {"mm_projector": plain(vision_width)}

    def group(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, P, C] to [N, P / k^2, C]."""
        return average_neighbours(features, grid, self.kernel)


@register("token_concat")
class TokenConcat(GroupingReducer):
    """k x k neighbours side by side along the channels, then the projector of `mm_projector_type` from that width."""

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`mm_projector` alone, from k^2 C."""
        return {"mm_projector": plain(vision_width * self.kernel**2)}
