"""Samples a second and memory of training with the logits of all tokens, and with those that are learnt, in chunks.

    OMP_NUM_THREADS=1 python -m benchmarks.head_loss [--samples 16] [--batch 8] [--repeats 5] [--scale 0.25]
    python -m benchmarks.head_loss --width 4096 --intermediate 11008 --heads 32 --layers 8 --scale 1 --device cuda

The samples are those of `benchmarks/packing.py`, of whose text the last half is learnt; the vocabulary is Llama's. Both
ways take the same batches, by turns, in one run. Time is the wall's on a GPU, and on the CPU what the processor spent
on this program, which others on the machine disturb least. Memory is the most that a step takes on top of the weights:
on a GPU what torch allocates, on the CPU what the process has resident (Linux with glibc).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.packing import build_model, draw_samples, make_batch
from benchmarks.projectors import peak_bytes
from llava.constants import IGNORE_INDEX
from llava.model.language_model.packed import PACKED_SDPA


def step(model: Any, batches: list[dict[str, Tensor]], packed: bool, skip_logits: bool) -> None:
    """A forward and a backward pass for each batch."""
    for batch in batches:
        model(**batch, packed=packed, skip_logits=skip_logits).loss.backward()
        model.zero_grad(set_to_none=True)


def seconds(run: Callable[[], None], device: str) -> float:
    """Time of one call, over all threads on the CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.25, help="multiplies all lengths, for a small machine")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--trains-head", action="store_true", help="all weights are trained; default: all but the head")
    parser.add_argument("--attention", default=PACKED_SDPA, help=f"{PACKED_SDPA} or flash_attention_2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    model = build_model(args, args.vocabulary)
    if not args.trains_head:
        model.lm_head.requires_grad_(False)  # as with LoRA
    samples = draw_samples(args.samples, args.scale, seed=0)
    weight = model.lm_head.weight
    batches = [make_batch(samples[i : i + args.batch], args.width, weight) for i in range(0, args.samples, args.batch)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    learnt = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    print(
        f"{args.samples} samples, {tokens} tokens, {learnt / tokens:.0%} learnt, batch {args.batch}; "
        f"width {args.width}, {args.layers} layers, {args.vocabulary} words, "
        f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads"
    )
    for packed in (False, True):
        runs = {skip: partial(step, model, batches, packed, skip) for skip in (False, True)}
        peaks = {skip: (run(), peak_bytes(run, args.device))[1] for skip, run in runs.items()}
        times: dict[bool, list[float]] = {skip: [] for skip in runs}
        for _ in range(args.repeats):
            for skip, run in runs.items():
                times[skip].append(seconds(run, args.device))
        for skip, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(times[False], values, strict=True))
            print(
                f"{'packed' if packed else 'padded'}, logits of {'what is learnt' if skip else 'all tokens':14s}"
                f"{args.samples / statistics.median(values):8.2f} samples/s {ratio:6.2f} x"
                f"{peaks[skip] / 2**20:8.0f} MiB"
            )


if __name__ == "__main__":
    main()
