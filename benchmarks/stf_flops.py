"""Arithmetic of LLaVA-1.5-7B's visual tokens in the language model, and of the projectors that make them.

    python benchmarks/stf_flops.py

By the formulas of `llava.cost`, a multiplication and an addition as two. The language model's share is that of the
visual tokens alone, without the head, which no visual token needs: as Table 2 of https://arxiv.org/abs/2506.07138 has
it.
"""

from __future__ import annotations

from typing import Any, cast

from llava.cost import open_model
from llava.cost.formulas import flops, linear
from llava.cost.question import layer_works
from llava.cost.sizes import Sizes
from llava.cost.tokens import projector_passes
from llava.reduction import build
from llava.reduction.base import ProjectorReducer, Reducers

GRID, DEPTH, SELECTED = (24, 24), 24, 23  # CLIP-L/336, of which mm_vision_select_layer=-2 is read
VISION_WIDTH, WIDTH = 1024, 4096  # C, D
PROJECTORS: dict[str, dict[str, Any] | None] = {
    "mlp2x_gelu": None,
    "avgpool": {"name": "avgpool"},
    "token_concat": {"name": "token_concat"},
    "tokenpacker": {"name": "tokenpacker"},
    "mqt": {"name": "mqt", "tokens": 64},
    "m3": {"name": "m3", "tokens": 36},
    "stf, MBTF alone": {"name": "stf", "kernel": 1},
    "stf, without MBTF": {"name": "stf", "mbtf": None},
    "stf": {"name": "stf"},
    "stf, paper": {"name": "stf", "variant": "paper"},
    "stf, paper, k=2 E=2": {"name": "stf", "variant": "paper", "tokens_out": 2},
    "stf, paper, k=4 E=4": {"name": "stf", "variant": "paper", "kernel": 4, "tokens_out": 4},
}


def llm_flops(tokens: int) -> float:
    """Of the layers of Vicuna-7B for so many tokens."""
    sizes = Sizes.of(open_model("7b"))
    return flops(layer_works(sizes, [(tokens, tokens)] * len(sizes.layers)))


def projector_flops(options: dict[str, Any] | None) -> tuple[int, float, float]:
    """Visual tokens an image, and the arithmetic of the fusion of blocks and of `mm_projector`."""
    reducer = None if options is None else cast(ProjectorReducer, build(**options))
    tokens, passes = projector_passes(open_model("7b"), Reducers(projector=reducer))
    fusion = 2 if reducer is not None and reducer.blocks(DEPTH, SELECTED) else 0  # its linear layers come first
    costs = [flops([linear(layer, rows)]) for layer, rows in passes]
    return tokens, sum(costs[:fusion]), sum(costs[fusion:])


def main() -> None:
    print(f"{'projector':24s}{'tokens':>8s}{'LLM':>10s}{'blocks fused':>15s}{'mm_projector':>15s}   TFLOPs an image")
    for label, options in PROJECTORS.items():
        tokens, fused, projected = projector_flops(options)
        costs = [llm_flops(tokens), fused, projected]
        print(f"{label:24s}{tokens:8d}{costs[0] / 1e12:10.2f}{costs[1] / 1e12:15.4f}{costs[2] / 1e12:15.4f}")


if __name__ == "__main__":
    main()
