"""MQT: learned queries take the place of the projector; the first m of them are the visual tokens.

Paper: Matryoshka Query Transformer for Large Vision-Language Models, https://arxiv.org/abs/2405.19315.
Shapes: N images, P patches on a grid of h x w, m tokens of M = 256, C vision width, D language-model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from llava.reduction.base import ProjectorReducer, VisionFeatures, VisualTokens
from llava.reduction.options import Count, Within
from llava.reduction.projector.attention import CrossAttention, head_count
from llava.reduction.projector.grouping import grid_of
from llava.reduction.registry import register

SIDE = 16  # of the grid of positions, one for each query
QUERIES = SIDE**2
HEADS = 16
EPS = 1e-6
Queries = Annotated[int, Within(1, QUERIES)]


@register("mqt")
class Mqt(ProjectorReducer):
    """The first `tokens` of 256 queries attend to all patches, by place alone: keys are the patches' positions.

    Trained with another number of queries at each step, the first ones hold the most; any number then is a prefix of
    all. The number of a step follows from the seed, the step and the process, so that a run that goes on repeats it.

    | step | paper | release | here |
    |---|---|---|---|
    | keys | the patches | their positions only | as the release |
    | number of a step, stage 2 | one of 2, 4, ..., 256 | without a seed of its own | by the run's seed |
    | positions in half precision | - | rounded again after interpolation | interpolated in float32, and rounded once |
    """

    is_trained = True
    tokens: Queries = QUERIES  # m, for inference, and for training without `draws`
    draws: bool = False  # in training, draw one of 2, 4, ..., 256 for each step of a process (the second stage)
    heads: Count | None = None  # of the attention; null: 16, or fewer in a tower of less than 128 channels

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """All numbers of queries."""
        return [{"tokens": count} for count in range(1, QUERIES + 1)]

    def token_count(self, grid: tuple[int, int]) -> int:
        return self.tokens

    def in_training(self, grid: tuple[int, int], draw: int) -> Sequence[ProjectorReducer]:
        """This method, at the number that is drawn where `draws` says so."""
        return (self.trained_like(tokens=2 * (1 + draw % (QUERIES // 2))) if self.draws else self,)

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`query_abstractor` alone; there is no `mm_projector`."""
        heads = self.heads or head_count(vision_width, HEADS)
        if vision_width % heads or vision_width % 4:
            raise self.mistake(
                f"the {vision_width} channels of the vision tower must be divided by 4 and by heads={heads}"
            )
        return {"query_abstractor": QueryAbstractor(vision_width, width, heads)}

    def forward(self, vision: VisionFeatures, query_abstractor: nn.Module) -> VisualTokens:
        """[N, P, C] patches in, [N, m, D] out; each token is an aggregate of all patches."""
        grid = grid_of(vision)
        return self.placed(query_abstractor(vision.features, grid, self.tokens), grid)


class QueryAbstractor(nn.Module):
    """The release's modules.

    Args:
        c: vision width, a multiple of 4.
        d: language-model width.
        heads: of the attention.
    """

    def __init__(self, c: int, d: int, heads: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(positions(SIDE, c), requires_grad=False)
        self.query = nn.Parameter(torch.empty(QUERIES, c))
        self.proj = nn.Parameter(torch.randn(c, d) * c**-0.5)
        self.attn = CrossAttention(c, heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(c, eps=EPS) for _ in range(3))
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, features: Tensor, grid: tuple[int, int], tokens: int) -> Tensor:
        """[N, P, C] patches on a grid of (h, w) to [N, m, D] for the first m queries."""
        keys = self.pos_embed.float().T.unflatten(1, (SIDE, SIDE)).unsqueeze(0)
        keys = interpolate(keys, grid, mode="bicubic", align_corners=False).flatten(2).mT.to(self.query.dtype)
        queries = self.ln_q((self.query[:tokens] + self.pos_embed[:tokens]).unsqueeze(0))
        return self.attn(queries, self.ln_k(keys), self.ln_v(features.to(self.query.dtype))) @ self.proj


def positions(side: int, c: int) -> Tensor:
    """[side^2, C], sines and cosines of the column in the first half and of the row in the second, at fp16 values."""
    frequencies = 10000 ** (-torch.arange(c // 4, dtype=torch.float64) / (c // 4))
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # of each column or row
    table = torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1)
    return table.half().float()
