"""Plan a finetuning run of LLaVA-1.5 on 8, 64 and 512 GPUs: memory, step, hours, checkpoints. Arithmetic, not measured.

    python benchmarks/scale_plan.py [--model 13b] [--utilization 0.3] [--device A100]

By the formulas of `llava.cost.training`: a step in 16 bits with gradient checkpointing, DeepSpeed's Adam and a frozen
vision tower, at so much of the peak (MFU, which counts no recomputation). Checkpoint: 2 bytes a weight for the model,
12 for what resuming needs; written at --disk GB/s in all.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from llava.cost import TrainingRun, open_model, training_cost
from llava.cost.devices import DEVICES, find_device
from llava.train.settings.arguments import accumulation_steps

SAMPLES = 665_298  # LLaVA-1.5's finetuning mix
TEXT = 300  # tokens of text a sample, roughly; depends on the mix

METHODS: dict[str, Any] = {
    "none": None,
    "STF, 144 tokens": "stf",
    "TRIM 1/4 + mean": {"name": "trim", "ratio": 0.25},
    "PyramidDrop": "pyramiddrop",
}


def row(model: Any, name: str, gpus: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    busy = min(gpus, args.global_batch)
    per_device = min(16, args.global_batch // busy)
    steps = accumulation_steps(args.global_batch, per_device, busy)
    run = TrainingRun(
        batch=per_device, text_tokens=TEXT, devices=busy, device=args.device, utilization=args.utilization
    )
    costs = {stage: training_cost(model, METHODS[name], replace(run, zero_stage=stage)) for stage in (2, 3)}
    room = 0.9 * find_device(args.device).memory
    fitting = [stage for stage, cost in costs.items() if cost.memory.total < room]
    stage = fitting[0] if fitting else 3
    cost = costs[stage]
    rate = busy * per_device / cost.seconds  # samples a second
    note = f" ({busy} of them)" if busy < gpus else ""
    return (
        f"| {gpus}{note} | {name} | {stage}{'' if fitting else ', offload'} | {per_device} x {steps} | "
        f"{cost.memory.total / 1e9:.0f} | {rate * cost.lengths[0]:,.0f} | {SAMPLES / rate / 3600:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="a name or folder, as for `llava flops`")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--utilization", type=float, default=0.3, help="part of the peak that a run reaches")
    parser.add_argument("--device", choices=DEVICES, default="A100")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s to the shared storage")
    args = parser.parse_args()
    model = open_model(args.model)
    print("| GPUs | method | ZeRO | batch a GPU x accumulation | GB a GPU | tokens/s in all | hours an epoch |")
    print("|---|---|---|---|---|---|---|")
    for gpus in (8, 64, 512):
        for name in METHODS:
            print(row(model, name, gpus, args))
    trained = sum(p.numel() for name, p in model.named_parameters() if "vision_tower" not in name)
    weights, resume = trained * 2 / 1e9, trained * 14 / 1e9
    print(
        f"\n{trained / 1e9:.2f} B trained weights. Model {weights:.0f} GB; checkpoint to resume from {resume:.0f} GB, "
        f"{resume / args.disk:.0f} s at {args.disk:g} GB/s."
    )


if __name__ == "__main__":
    main()
