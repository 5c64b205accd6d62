"""Time of the parts of a model, on a GPU by its own events, which do not make the host wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Clock:
    """Marks points in the work of a device.

    Args:
        device: whose time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """This point: on a GPU an event in its queue, otherwise the time now."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; the device must have passed both."""
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start


class Phases:
    """Sums the time of modules that are watched, and of blocks that are named.

    Args:
        clock: of the device that they run on.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = self._clock.mark()
        yield
        self._marks.append((name, start, self._clock.mark()))

    @contextmanager
    def watch(self, modules: Mapping[str, nn.Module | None]) -> Iterator[None]:
        """Time every call of these modules; None stands for one that this model lacks."""
        with ExitStack() as stack:
            for name, module in modules.items():
                if module is not None:
                    for handle in self._hook(name, module):
                        stack.callback(handle.remove)
            yield

    def _hook(self, name: str, module: nn.Module) -> Sequence[Any]:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(self._clock.mark())

        def after(*_: Any) -> None:
            self._marks.append((name, begun.pop(), self._clock.mark()))

        return module.register_forward_pre_hook(before), module.register_forward_hook(after)

    def seconds(self) -> dict[str, float]:
        """Time of each phase since the last call."""
        self._clock.wait()
        sums: dict[str, float] = {}
        for name, start, end in self._marks:
            sums[name] = sums.get(name, 0.0) + self._clock.seconds(start, end)
        self._marks.clear()
        return sums


@dataclass(frozen=True)
class Spread:
    """Measurements of one thing.

    Attributes:
        median: of all.
        low, high: first and third quartile.
        number: of measurements.
    """

    median: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(statistics.median(values), low, high, len(values))


def by_turns(
    runs: Mapping[str, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Run each candidate once a round, in an order that turns, so that none has the machine's good or bad minutes.

    Args:
        runs: by name, what runs one and returns its measurements.
        rounds: of all.
        warm_up: rounds before those that count.

    Returns:
        For each name, each measurement's values.
    """
    names = list(runs)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for key, value in runs[name]().items():
                if turn >= 0:
                    found[name].setdefault(key, []).append(value)
    return found
