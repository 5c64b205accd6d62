"""Arithmetic of LLaVA-1.5-7B's visual tokens in the language model, and of the projectors that make them.

    python benchmarks/stf_flops.py

Counted by torch on the meta device, a multiplication and an addition as two, so no memory or time is spent. The
language model's share is that of the visual tokens alone, without the head, which no visual token needs: as Table 2 of
https://arxiv.org/abs/2506.07138 has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from llava.model.multimodal_projector.builder import build_vision_projector
from llava.reduction import VisionFeatures, build
from llava.reduction.base import ProjectorReducer
from llava.reduction.projector.grouping import concatenate_states

GRID, DEPTH, SELECTED = (24, 24), 24, 23  # CLIP-L/336, of which mm_vision_select_layer=-2 is read
VISION_WIDTH, WIDTH = 1024, 4096  # C, D
PROJECTORS: dict[str, dict[str, Any] | None] = {
    "mlp2x_gelu": None,
    "avgpool": {"name": "avgpool"},
    "token_concat": {"name": "token_concat"},
    "stf, MBTF alone": {"name": "stf", "kernel": 1},
    "stf, without MBTF": {"name": "stf", "mbtf": None},
    "stf": {"name": "stf"},
    "stf, paper": {"name": "stf", "variant": "paper"},
    "stf, paper, k=2 E=2": {"name": "stf", "variant": "paper", "tokens_out": 2},
    "stf, paper, k=4 E=4": {"name": "stf", "variant": "paper", "kernel": 4, "tokens_out": 4},
}


def flops(run: Callable[[], object]) -> int:
    """What a call computes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@cache
def llm_flops(tokens: int) -> int:
    """Of the layers of Vicuna-7B for so many tokens."""
    with torch.device("meta"):
        model = LlamaModel._from_config(LlamaConfig(), attn_implementation="eager")
        embeds = torch.empty(1, tokens, WIDTH)
        mask = torch.zeros(1, 1, tokens, tokens)  # a whole one: what makes one from less looks at its values
        return flops(lambda: model(inputs_embeds=embeds, attention_mask=mask, use_cache=False))


def projector_flops(options: dict[str, Any] | None) -> tuple[int, int, int]:
    """Visual tokens an image, and the arithmetic of the fusion of blocks and of `mm_projector`."""
    config = SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=VISION_WIDTH, hidden_size=WIDTH)
    with torch.device("meta"):
        features = torch.empty(1, GRID[0] * GRID[1], VISION_WIDTH)
        if options is None:
            plain = build_vision_projector(config)
            return features.shape[1], 0, flops(lambda: plain(features))
        reducer = cast(ProjectorReducer, build(**options))
        modules = reducer.build_modules(VISION_WIDTH, WIDTH, lambda width: build_vision_projector(config, width))
        states = dict.fromkeys(reducer.blocks(DEPTH, SELECTED), features)
        vision = VisionFeatures(features, grid=GRID, hidden_states=states)
        total = flops(lambda: reducer(vision, **modules))
        fusion = modules.get("mm_projector_crosslayer")
        fused = 0 if fusion is None else flops(lambda: fusion(concatenate_states(vision)))
        return reducer(vision, **modules).features.shape[1], fused, total - fused


def main() -> None:
    print(f"{'projector':24s}{'tokens':>8s}{'LLM':>10s}{'blocks fused':>15s}{'mm_projector':>15s}   TFLOPs an image")
    for label, options in PROJECTORS.items():
        tokens, fused, projected = projector_flops(options)
        costs = [llm_flops(tokens), fused, projected]
        print(f"{label:24s}{tokens:8d}{costs[0] / 1e12:10.2f}{costs[1] / 1e12:15.4f}{costs[2] / 1e12:15.4f}")


if __name__ == "__main__":
    main()
