"""The text of `llava bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava.cost.bench.report import tables
from llava.cost.bench.run import Plan, run
from llava.cost.bench.workload import Workload
from llava.cost.command import all_methods
from llava.model.weights import parse_dtype

FORMATS = ("markdown", "json")


def bench(
    model: str,
    methods: Sequence[str],
    *,
    batch: str,
    shape: Mapping[str, int],
    form: str,
    device: str | None,
    dtype: str,
    **settings: Any,
) -> str:
    """Time methods, and say what came out.

    Args:
        model: see `open_subject`.
        methods: what `ReductionConfig.parse` reads, or "all".
        batch: sizes with commas between them.
        shape: of `Workload`.
        form: one of `FORMATS`.
        device: None: the GPU where there is one.
        dtype: "auto": bfloat16 on a GPU, float32 on the CPU.
        settings: of `Plan`.

    Raises:
        ValueError: an unknown model, method, format, size or device.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {place!r}: torch sees no GPU here")
    chosen = {name: name for name in methods if name != "all"}
    if "all" in methods:
        chosen |= all_methods()
    plan = Plan(
        model=model,
        methods=chosen,
        batches=_sizes(batch),
        work=Workload(**shape),
        device=place,
        dtype=parse_dtype(dtype) or (torch.bfloat16 if place.startswith("cuda") else torch.float32),
        **settings,
    )
    result = run(plan)
    return json.dumps(result, indent=1) + "\n" if form == "json" else tables(result)


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"batch={text!r}: expected sizes with commas between them, such as 1,8,32") from error
