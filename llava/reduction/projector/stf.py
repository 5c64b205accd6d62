"""STF and MBTF: fuse the hidden states of several vision blocks, then neighbours on the grid, into few tokens.

Paper: Learning Compact Vision Tokens for Efficient Large Multimodal Models, https://arxiv.org/abs/2506.07138,
sections 3.3 (MBTF) and 3.4 (STF), Table 1.
Shapes: N images, P patches, k side of a group, E tokens a group, M fused blocks, C vision width, D language-model
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from llava.reduction.options import Count, Variant, to_fields
from llava.reduction.projector.grouping import GroupingReducer
from llava.reduction.registry import register


@register("stf")
class Stf(GroupingReducer):
    """Fuse M hidden states of the tower into one (MBTF), then k x k neighbours into E tokens (STF).

    A 1 x 1 convolution is a linear layer on each patch, and a k x k convolution of stride k one on the concatenated
    neighbours; so both variants are made of linear layers.

    - release: blocks in falling order, the selected one in place of the last. MBTF is linear M C -> 4 C, GELU, linear
      4 C -> C; STF is linear k^2 C -> 16 C, GELU, linear 16 C -> D. Released for k = 2, M = 8 and E = 1 only; with more
      tokens the last layer has E D outputs here.
    - paper: blocks in rising order, the last one among them, and a GELU after every layer. STF has a layer more,
      k^2 C -> k^2 C, whose output is cut into E tokens; then, for each, k^2 C / E -> four times that -> D.

    With kernel=1 neighbours are not fused, and what follows MBTF is the plain projector of `mm_projector_type`.
    """

    tokens_out: Count = 1  # tokens E that a group of k x k patches becomes
    mbtf: Count | list[Count] | Literal["off", False] | None = 8  # how many blocks to fuse (M), or which; or none
    variant: Variant = "release"

    def validate(self) -> None:
        super().validate()
        if self.tokens_out > self.kernel**2:
            raise self.mistake(
                f"tokens_out={self.tokens_out} would make more tokens than the {self.kernel} x {self.kernel} patches "
                f"they stand for; at most {self.kernel**2} with kernel={self.kernel}"
            )
        if isinstance(self.mbtf, list | tuple) and (not self.mbtf or len(set(self.mbtf)) < len(self.mbtf)):
            raise self.mistake(f"mbtf={self.mbtf!r} must be a list of different blocks such as [23, 12, 3]")

    def token_count(self, grid: tuple[int, int]) -> int:
        return super().token_count(grid) * (self.tokens_out if self.kernel > 1 else 1)

    @property
    def num_blocks(self) -> int:
        """M, the number of blocks to fuse; 0 without MBTF."""
        if isinstance(self.mbtf, list | tuple):
            return len(self.mbtf)
        return int(self.mbtf) if isinstance(self.mbtf, int) else 0

    def blocks(self, depth: int, selected: int) -> tuple[int, ...]:
        """The blocks that MBTF fuses: those of the list, or M evenly spaced ones."""
        mbtf = self.mbtf
        if isinstance(mbtf, list | tuple):
            blocks = tuple(mbtf)
        else:
            blocks = evenly_spaced(self.num_blocks, depth)
            if self.variant == "release" and blocks:
                blocks = (selected, *reversed(blocks[:-1]))
        if any(not 1 <= block <= depth for block in blocks) or len(set(blocks)) < len(blocks):
            raise self.mistake(
                f"mbtf={mbtf!r} means the blocks {list(blocks)}; the vision tower has the blocks 1 to "
                f"{depth}, and each is fused once; give a smaller number, or a list of blocks such as mbtf=[{depth}, 1]"
            )
        return blocks

    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """`mm_projector`, and `mm_projector_crosslayer` where blocks are fused."""
        modules = {"mm_projector": self._spatial_fusion(vision_width, width, plain)}
        if self.num_blocks:
            modules["mm_projector_crosslayer"] = self._block_fusion(vision_width)
        return modules

    def _block_fusion(self, c: int) -> nn.Module:
        """[N, P, M * C] to [N, P, C]."""
        layers = [nn.Linear(self.num_blocks * c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)]
        return nn.Sequential(*layers, *([nn.GELU()] if self.variant == "paper" else []))

    def _spatial_fusion(self, c: int, d: int, plain: Callable[[int], nn.Module]) -> nn.Module:
        """[N, P / k^2, k^2 * C] to [N, P / k^2, E, D]; without the dimension of E where k = 1."""
        k, e = self.kernel, self.tokens_out
        if k == 1:
            return plain(c)
        square = k * k * c
        if self.variant == "release":
            return nn.Sequential(
                nn.Linear(square, 16 * c), nn.GELU(), nn.Linear(16 * c, e * d), nn.Unflatten(-1, (e, d))
            )
        if square % e:
            raise self.mistake(f"tokens_out={e} does not divide the {square} channels of a fused group")
        part = square // e
        return nn.Sequential(
            *(nn.Linear(square, square), nn.GELU(), nn.Unflatten(-1, (e, part))),
            *(nn.Linear(part, 4 * part), nn.GELU(), nn.Linear(4 * part, d), nn.GELU()),
        )


def evenly_spaced(count: int, depth: int) -> tuple[int, ...]:
    """Every (depth / count)-th block up to the last, rounded to the nearest: 3, 6, ..., 24 for 8 of 24.

    Raises:
        ValueError: more blocks than there are.
    """
    if count > depth:
        raise ValueError(f"method 'stf': mbtf={count} asks for more blocks than the {depth} that the vision tower has")
    return tuple((2 * depth * i + count) // (2 * count) for i in range(1, count + 1))


def options_of_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Name and options of the released STF, if these are weights of it; its checkpoints do not name their method.

    Args:
        shapes: by name, whatever stands in front of `mm_projector`; those of other modules are not looked at.

    Returns:
        The method as in a config; None where no hidden states are fused, so that the weights say nothing.

    Raises:
        ValueError: the weights fuse hidden states, but otherwise than the release does.
    """
    found = {k[k.index("mm_projector") :]: v for k, v in shapes.items() if "mm_projector" in k}
    if not any(name.startswith("mm_projector_crosslayer.") for name in found):
        return None
    try:
        c, d = (found[f"{name}.2.bias"][0] for name in ("mm_projector_crosslayer", "mm_projector"))
        inputs, square = (found[f"{name}.0.weight"][1] for name in ("mm_projector_crosslayer", "mm_projector"))
        method = {"name": "stf", "variant": "release", "kernel": math.isqrt(square // c), "mbtf": inputs // c}
        expected = _released_shapes(method, c, d)
    except (KeyError, IndexError, ValueError):
        expected = {}
    if found != expected:
        raise ValueError(
            "the weights mm_projector_crosslayer.* fuse hidden states of the vision tower, but they and mm_projector.* "
            f"are not of the released STF's shapes: {found}. Name the method that they were trained with, e.g. "
            "reduction={'name': 'stf', 'variant': 'paper'}"
        )
    return method


def _released_shapes(method: Mapping[str, Any], c: int, d: int) -> dict[str, tuple[int, ...]]:
    options = {k: v for k, v in method.items() if k != "name"}
    with torch.device("meta"):
        modules = Stf(**to_fields("stf", Stf, options)).build_modules(c, d, lambda width: nn.Identity())
        return {name: tuple(weight.shape) for name, weight in nn.ModuleDict(modules).named_parameters()}
