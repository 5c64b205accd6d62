"""Plan a finetuning run of LLaVA-1.5 on 8, 64 and 512 GPUs: memory, step, hours, checkpoints. Arithmetic, not measured.

    python benchmarks/scale_plan.py [--model 13b] [--utilization 0.4] [--peak 312] [--memory 80]

- FLOPs: a layer of n tokens costs 2 (4nd^2 + 2n^2d + 3ndm) forward (PyramidDrop, equation 4, at two operations a
  multiply-add), the head 2ndV; a training step costs three times that, four with gradient checkpointing.
- Memory of a GPU: 2 bytes a weight for weights and for gradients, 12 for Adam's (float32 weight and two moments);
  ZeRO-2 divides gradients and optimizer by the number of GPUs, ZeRO-3 the weights too. Activations with gradient
  checkpointing: 2 bytes for the input of each layer, 2 (8d + 3m) a token for the layer at work, 10 a logit.
- Checkpoint: 2 bytes a weight for the model, 12 for what resuming needs; written at --disk GB/s in all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from llava.reduction import build
from llava.train.settings.arguments import accumulation_steps

SAMPLES = 665_298  # LLaVA-1.5's finetuning mix
TEXT = 300  # tokens of text a sample, roughly; depends on the mix


@dataclass(frozen=True)
class Shape:
    """A language model's sizes."""

    width: int
    layers: int
    intermediate: int
    vocabulary: int = 32000

    @property
    def weights(self) -> int:
        layer = 4 * self.width**2 + 3 * self.width * self.intermediate
        return self.layers * layer + 2 * self.width * self.vocabulary


MODELS = {"7b": Shape(4096, 32, 11008), "13b": Shape(5120, 40, 13824)}
# Image tokens that enter, and the decoder reducer that drops more of them.
METHODS = {
    "none": (576, None),
    "STF, 144 tokens": (144, None),
    "TRIM 1/4 + mean": (145, None),
    "PyramidDrop": (576, "pyramiddrop"),
}


def lengths(shape: Shape, tokens: int, decoder: str | None) -> list[int]:
    """Tokens of a sample that each layer sees."""
    result, kept = [], tokens
    drops = {} if decoder is None else {d.after: d.keep for d in build(decoder).drops(shape.layers)}  # type: ignore[attr-defined]
    for layer in range(shape.layers):
        kept = int(tokens * drops[layer]) if layer in drops else kept
        result.append(kept + TEXT)
    return result


def sample_flops(shape: Shape, seen: list[int]) -> float:
    """FLOPs of a training step on one sample, with gradient checkpointing."""
    d, m = shape.width, shape.intermediate
    layers = sum(2 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m) for n in seen)
    return 4 * layers + 3 * 2 * seen[-1] * d * shape.vocabulary


def memory(shape: Shape, seen: list[int], per_device: int, gpus: int, stage: int) -> float:
    """GB on one GPU."""
    weights = shape.weights * 2 / (gpus if stage == 3 else 1)
    states = shape.weights * 14 / gpus
    work = 2 * seen[0] * (8 * shape.width + 3 * shape.intermediate)
    activations = sum(2 * n * shape.width for n in seen) + work + 10 * seen[-1] * shape.vocabulary
    return (weights + states + per_device * activations) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--utilization", type=float, default=0.4, help="part of the peak that a run reaches")
    parser.add_argument("--peak", type=float, default=312.0, help="TFLOP/s of a GPU; 312: A100, bfloat16")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of a GPU")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s to the shared storage")
    args = parser.parse_args()
    shape = MODELS[args.model]
    print("| GPUs | method | ZeRO | batch a GPU x accumulation | GB a GPU | tokens/s in all | hours an epoch |")
    print("|---|---|---|---|---|---|---|")
    for gpus in (8, 64, 512):
        busy = min(gpus, args.global_batch)
        for name, (tokens, decoder) in METHODS.items():
            seen = lengths(shape, tokens, decoder)
            per_device = min(16, args.global_batch // busy)
            steps = accumulation_steps(args.global_batch, per_device, busy)
            need = {stage: memory(shape, seen, per_device, busy, stage) for stage in (2, 3)}
            fitting = [stage for stage in need if need[stage] < 0.9 * args.memory]
            stage = fitting[0] if fitting else 3
            rate = busy * args.peak * 1e12 * args.utilization / sample_flops(shape, seen)  # samples/s
            note = f" ({busy} of them)" if busy < gpus else ""
            print(
                f"| {gpus}{note} | {name} | {stage}{'' if fitting else ', offload'} | {per_device} x {steps} | "
                f"{need[stage]:.0f} | {rate * (tokens + TEXT):,.0f} | "
                f"{SAMPLES / rate / 3600:.1f} |"
            )
    model, resume = shape.weights * 2 / 1e9, shape.weights * 14 / 1e9
    print(
        f"\n{shape.weights / 1e9:.2f} B weights. Model {model:.0f} GB; checkpoint to resume from {resume:.0f} GB, "
        f"{resume / args.disk:.0f} s at {args.disk:g} GB/s."
    )


if __name__ == "__main__":
    main()
