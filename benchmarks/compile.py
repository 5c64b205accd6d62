"""Time of the vision tower and of a language model's layers, eager and under torch.compile, by turns in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.compile [--rounds 5] [--batch 4] [--layers 2]
    python -m benchmarks.compile --width 4096 --intermediate 11008 --heads 32 --device cuda --dtype bfloat16

Random weights. The tower is CLIP-L/336's with as many layers as the language model here has; the language model runs a
forward pass (prefill) and a training step with all weights of its layers, each layer compiled by itself, as with the
staged runner. Compiling is timed apart: it is paid once a shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.cost.bench.timing import Clock, Spread, by_turns
from llava.model.language_model.families import LlavaLlamaConfig, LlavaLlamaForCausalLM

WAYS = ("eager", "compiled")


def build_layers(args: argparse.Namespace) -> Any:
    """The inner model of a Llama."""
    config = LlavaLlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=64,
        use_cache=False,
    )
    return LlavaLlamaForCausalLM(config).get_model()


def build_tower(args: argparse.Namespace) -> nn.Module:
    """CLIP-L/336's encoder, with fewer layers."""
    shapes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config = CLIPVisionConfig(**shapes, image_size=336, patch_size=14, num_hidden_layers=args.layers)
    return CLIPVisionModel(config).requires_grad_(False)


def cases(args: argparse.Namespace) -> dict[str, Callable[[str], Callable[[], object]]]:
    """By name, what makes a run in one of `WAYS`; both run on the same weights."""
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    torch.manual_seed(0)
    tower, layers = build_tower(args).to(**place), build_layers(args).to(**place)
    pixels = torch.randn(args.batch, 3, 336, 336, **place)
    hidden = torch.randn(args.batch, args.tokens, args.width, **place)
    compiled: dict[nn.Module, Any] = {part: torch.compile(part) for part in (tower, *layers.layers)}

    def part(module: nn.Module, way: str) -> Any:
        return compiled[module] if way == "compiled" else module

    def forward(way: str) -> Tensor:
        positions = torch.arange(args.tokens, device=args.device).unsqueeze(0)
        embeddings = layers.rotary_emb(hidden, position_ids=positions)
        state = hidden
        for layer in layers.layers:
            state = part(layer, way)(state, attention_mask=None, position_embeddings=embeddings)
        return state

    def encode(way: str) -> Callable[[], object]:
        return lambda: part(tower, way)(pixels)

    def prefill(way: str) -> Callable[[], object]:
        return torch.no_grad()(lambda: forward(way))

    def train(way: str) -> Callable[[], object]:
        def step() -> None:
            forward(way).float().square().mean().backward()
            layers.zero_grad(set_to_none=True)

        return step

    return {"vision tower": encode, "layers, prefill": prefill, "layers, training step": train}


def timed(run: Callable[[], object], clock: Clock) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        clock.wait()
        start = clock.mark()
        run()
        end = clock.mark()
        clock.wait()
        return {"seconds": clock.seconds(start, end)}

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    clock = Clock(torch.device(args.device))
    print(f"{vars(args)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| part | eager | compiled | ratio | to compile |\n|---|---|---|---|---|")
    for name, make in cases(args).items():
        runs = {way: make(way) for way in WAYS}
        start = time.perf_counter()
        runs["compiled"]()
        clock.wait()
        first = time.perf_counter() - start
        found = by_turns({way: timed(run, clock) for way, run in runs.items()}, args.rounds)
        times = {way: Spread.of(found[way]["seconds"]) for way in WAYS}
        ratio = Spread.of([a / b for a, b in zip(*(found[way]["seconds"] for way in WAYS), strict=True)])
        cells = [f"{1000 * times[way].median:.0f} ms" for way in WAYS]
        print(
            f"| {name} | {' | '.join(cells)} | {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] | {first:.0f} s |"
        )


if __name__ == "__main__":
    main()
