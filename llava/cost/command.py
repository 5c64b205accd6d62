"""`llava flops`: rows of costs beside the baseline's, and the papers' figures beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llava.cost import table
from llava.cost.devices import find_device, find_precision
from llava.cost.papers import figures
from llava.cost.question import Scenario, question_cost
from llava.cost.sizes import open_model, reduction_of
from llava.cost.training import TrainingRun, training_cost
from llava.reduction.registry import available

BUDGETS = {name: f"{{name: {name}, ratio: 0.25}}" for name in ("sequential", "spatial", "random")}
BUDGETS["mqt"] = "{name: mqt, tokens: 64}"
BUDGETS["m3"] = "{name: m3, tokens: 36}"
BUDGETS["tome"] = "{name: tome, tokens: 144}"
"""For `all`: methods that have no budget of their own."""


def all_methods() -> dict[str, str]:
    """Every method by its name, as `ReductionConfig.parse` reads it, with a budget where it needs one."""
    return {name: BUDGETS.get(name, name) for names in available().values() for name in names}


def papers(form: str) -> str:
    """The text of `llava flops --papers`."""
    return table.render_papers(figures(), form)


def report(
    model: str,
    methods: Sequence[str],
    scenario: Scenario | TrainingRun,
    *,
    vision_tower: str | None,
    operations: int,
    form: str,
) -> str:
    """The text of `llava flops`.

    Args:
        model: what `open_model` reads.
        methods: what `ReductionConfig.parse` reads, or "all"; none: the checkpoint's own.
        scenario: a question or a training run.
        vision_tower: see `open_model`.
        operations: of a multiply-add.
        form: one of `table.FORMATS`.

    Raises:
        ValueError: an unknown model, method, format or convention.
    """
    if operations not in (1, 2):
        raise ValueError(f"operations={operations}: a multiply-add is counted as 1 or 2 operations")
    if form not in table.FORMATS:
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(table.FORMATS)}")
    opened = open_model(model, vision_tower)
    own = reduction_of(model)
    chosen: list[Any] = [*methods] or ([own] if own else [])
    if "all" in chosen:
        chosen = [*all_methods().values()]
    labels = ["baseline", *(method if isinstance(method, str) else json.dumps(method) for method in chosen)]
    rows = _rows(opened, [None, *chosen], labels, scenario, operations)
    return table.render(rows, _conventions(model, scenario, operations), form)


def _rows(
    model: Any, methods: Sequence[Any], labels: Sequence[str], scenario: Scenario | TrainingRun, operations: int
) -> list[table.Row]:
    """A row for each method; the first is what the others are compared with."""
    # A given number of image tokens is what a method leaves.
    cases: list[Any] = [replace(scenario, image_tokens=None), *[scenario] * (len(methods) - 1)]
    if isinstance(scenario, TrainingRun):
        steps = [training_cost(model, method, case) for method, case in zip(methods, cases, strict=True)]
        return [
            table.training_row(label, cost, steps[0], operations) for label, cost in zip(labels, steps, strict=True)
        ]
    costs = [question_cost(model, method, case) for method, case in zip(methods, cases, strict=True)]
    return [table.question_row(label, cost, costs[0], operations) for label, cost in zip(labels, costs, strict=True)]


def _conventions(model: str, scenario: Scenario | TrainingRun, operations: int) -> dict[str, Any]:
    """What holds for all rows."""
    device = find_device(scenario.device)
    said: dict[str, Any] = {
        "model": model,
        "multiply_add": f"{operations} operation{'s' if operations > 1 else ''}",
        "batch": scenario.batch,
        "images": scenario.images,
        "text_tokens": scenario.text_tokens,
    }
    if isinstance(scenario, TrainingRun):
        part = f"{scenario.utilization:.0%} of {device.peak_16 / 1e12:g} TFLOP/s, recomputation left out"
        return {**said, "trains": scenario.trains, "device": f"{scenario.devices} x {device.name}, {part}"}
    precision = find_precision(scenario.dtype, device)
    peak, rate = precision.peak(device) / 1e12, device.bandwidth / 1e9
    return {
        **said,
        "new_tokens": scenario.new_tokens,
        "dtype": precision.name,
        "device": f"{device.name}, {peak:g} TFLOP/s, {rate:g} GB/s; times are the least possible (roofline)",
    }


def parse_size(text: str | None) -> tuple[int, int] | None:
    """WIDTHxHEIGHT in pixels.

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"image size {text!r}: expected WIDTHxHEIGHT in pixels, such as 672x672")
    return int(found.group(1)), int(found.group(2))
