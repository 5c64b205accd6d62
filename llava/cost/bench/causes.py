"""Where a run's time goes: products, other work of the device, and the device waiting for the host.

Read off torch's profiler. On a GPU from its own timeline; on the CPU, where host and device are one, from the time of
operators.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# In the names of kernels and operators that multiply matrices, attention among them.
PRODUCTS = re.compile(
    r"gemm|gemv|cutlass|flash|fmha|mma|conv(?!ert)|matmul|attention|(?<![a-z])(add|b|badd)?mm(?![a-z])"
)
# Calls with which the host waits for the device, so that the device has nothing to do after it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Causes:
    """Seconds of a run.

    Attributes:
        products: matrices are multiplied; what FLOPs are about.
        traffic: other work of the device, most of which moves memory: norms, sums, copies, sorting.
        waits: the device is idle after the host has waited for it.
        launches: the device is idle otherwise: the host is not fast enough to launch kernels. On the CPU, all time
            outside of operators.
    """

    products: float
    traffic: float
    waits: float
    launches: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def beyond(self, other: Causes, ratio: float) -> dict[str, float]:
        """By cause, what this run takes beyond `ratio` times another's.

        Args:
            other: the baseline.
            ratio: of the FLOPs, this run's to the baseline's.
        """
        return {f.name: getattr(self, f.name) - ratio * getattr(other, f.name) for f in fields(self)}


def find_causes(run: Callable[[], Any], device: torch.device, trace: Path | None = None) -> Causes:
    """Profile a run.

    Args:
        run: what is run, once before and once under the profiler.
        device: where its work is done.
        trace: file for the timeline, which ui.perfetto.dev shows.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with _quiet(), profile(activities=activities) as profiler:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return causes_on_gpu(profiler.events()) if on_gpu else causes_on_cpu(profiler.key_averages(), seconds)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler itself writes to the terminal."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def is_product(name: str) -> bool:
    """Whether a kernel or an operator multiplies matrices, by its name."""
    lower = name.lower()
    return PRODUCTS.search(lower) is not None and "elementwise" not in lower


def causes_on_cpu(averages: Iterable[Any], seconds: float) -> Causes:
    """Of a run that took so many seconds, by its operators' own times.

    Args:
        averages: with `key` and `self_cpu_time_total` in microseconds.
        seconds: of the whole run.
    """
    products = traffic = 0.0
    for average in averages:
        if not average.key.startswith("aten::"):
            continue
        own = average.self_cpu_time_total / 1e6
        if is_product(average.key):
            products += own
        else:
            traffic += own
    return Causes(products, traffic, 0.0, max(0.0, seconds - products - traffic))


@dataclass(frozen=True)
class _Span:
    start: float
    end: float


def causes_on_gpu(events: Iterable[Any]) -> Causes:
    """Of the events of a profile, with `name`, `device_type` and `time_range` in microseconds."""
    kernels: list[tuple[_Span, bool]] = []
    waits: list[float] = []
    for event in events:
        span = _Span(event.time_range.start, event.time_range.end)
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((span, is_product(event.name)))
        elif event.name.startswith(WAITS) and "Async" not in event.name:
            waits.append(span.end)
    kernels.sort(key=lambda kernel: kernel[0].start)
    return _split(kernels, sorted(waits))


def _split(kernels: Sequence[tuple[_Span, bool]], waits: Sequence[float]) -> Causes:
    """Busy time by kind, and the gaps between kernels: a wait's where one ended in the gap, otherwise a launch's."""
    products = traffic = waited = launched = 0.0
    reached = kernels[0][0].start if kernels else 0.0
    for span, product in kernels:
        gap = span.start - reached
        if gap > 0:
            next_wait = bisect_left(waits, reached)
            if next_wait < len(waits) and waits[next_wait] <= span.start:
                waited += gap
            else:
                launched += gap
        busy = max(0.0, span.end - max(reached, span.start))
        if product:
            products += busy
        else:
            traffic += busy
        reached = max(reached, span.end)
    return Causes(*(value / 1e6 for value in (products, traffic, waited, launched)))
