"""Time and memory of the projector's methods, beside LLaVA's mlp2x_gelu.

    python -m benchmarks.projectors [--batch 8] [--repeats 5] [--device cuda --dtype bfloat16]

Widths are those of LLaVA-1.5-7B with CLIP-L/336: 576 patches of 1024 channels, 4096 for the language model. All are
timed in one run, by turns. The tower is not: the hidden states that it hands on are inputs here, and so are not part of
the memory, nor are the weights. Memory is the most that a call takes on top of them: on a GPU what torch allocates, on
the CPU what the process has resident (Linux with glibc).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.stf_flops import DEPTH, GRID, PROJECTORS, SELECTED, VISION_WIDTH, WIDTH
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.reduction import VisionFeatures, build
from llava.reduction.base import ProjectorReducer

DEFAULT = [label for label in PROJECTORS if "E=" not in label]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Case:
    """A projector with its weights and inputs, forwards or there and back."""

    def __init__(self, options: dict[str, Any] | None, batch: int, like: Tensor) -> None:
        config = SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=VISION_WIDTH, hidden_size=WIDTH)
        features = torch.randn(batch, GRID[0] * GRID[1], VISION_WIDTH).to(like)
        self.vision = VisionFeatures(features, grid=GRID)
        self.reducer: ProjectorReducer | None = None
        modules: dict[str, nn.Module] = {"mm_projector": build_vision_projector(config)}
        if options is not None:
            self.reducer = cast(ProjectorReducer, build(**options))
            modules = self.reducer.build_modules(
                VISION_WIDTH, WIDTH, lambda width: build_vision_projector(config, width)
            )
            blocks = self.reducer.blocks(DEPTH, SELECTED)
            self.vision.hidden_states = {block: torch.randn_like(features) for block in blocks}
        self.modules = nn.ModuleDict(modules).to(like)

    def forward(self) -> Tensor:
        if self.reducer is None:
            return self.modules["mm_projector"](self.vision.features)
        return self.reducer(self.vision, **self.modules).features

    @torch.no_grad()
    def infer(self) -> None:
        self.forward()

    def train(self) -> None:
        self.forward().sum().backward()
        self.modules.zero_grad(set_to_none=True)

    @property
    def weights(self) -> int:
        return sum(weight.numel() for weight in self.modules.parameters())


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """The most memory that a call takes on top of what is there before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not resident any more
    before = resident("VmRSS")
    CLEAR.write_text("5")  # the high-water mark starts at what is resident now
    run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="*", default=DEFAULT, help="labels; the first is 1 x")
    args = parser.parse_args()
    torch.manual_seed(0)
    like = torch.empty(0, device=args.device, dtype=getattr(torch, args.dtype))
    print(f"batch {args.batch}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    cases = {label: Case(PROJECTORS[label], args.batch, like) for label in args.only}
    for way in ("infer", "train"):
        runs = {label: getattr(case, way) for label, case in cases.items()}
        peaks = {label: (run(), peak_bytes(run, args.device))[1] for label, run in runs.items()}
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(args.repeats):
            for label, run in runs.items():
                times[label].append(seconds(run, args.device))
        plain = statistics.median(next(iter(times.values())))
        print({"infer": "forward", "train": "forward and backward"}[way])
        for label, case in cases.items():
            median = statistics.median(times[label])
            print(
                f"{label:24s}{median * 1e3:10.1f} ms {median / plain:6.2f} x{peaks[label] / 2**20:10.0f} MiB"
                f"{case.weights / 1e6:10.1f} M weights"
            )


if __name__ == "__main__":
    main()
