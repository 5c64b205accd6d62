"""Costs as rows, and rows as JSON, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava.cost.formulas import OPERATIONS
from llava.cost.papers import CONVENTIONS, Figure
from llava.cost.question import PARTS, QuestionCost
from llava.cost.training import TRAINING_PARTS, TrainingCost

FORMATS = ("markdown", "csv", "json")
Row = dict[str, Any]


def question_row(label: str, cost: QuestionCost, baseline: QuestionCost, operations: int = OPERATIONS) -> Row:
    """One method's costs and their ratios to the baseline's."""
    parts, times = cost.flops(operations), cost.seconds()
    total, time = sum(parts.values()), sum(times.values())
    passes = max(cost.scenario.new_tokens - 1, 1)
    return {
        "method": label,
        "visual_tokens": cost.image_tokens,
        "tokens_last_layer": cost.lengths[-1],
        **{f"{name}_tflops": parts[name] / 1e12 for name in PARTS},
        "tflops": total / 1e12,
        "flops_ratio": total / sum(baseline.flops(operations).values()),
        "weights_gb": cost.weights / 1e9,
        "kv_cache_gb": cost.cache / 1e9,
        "activations_gb": cost.activations / 1e9,
        "vision_ms": 1e3 * (times["vision"] + times["projector"]),
        "reducer_ms": 1e3 * times["reducer"],
        "prefill_ms": 1e3 * times["prefill"],
        "token_ms": 1e3 * times["decoding"] / passes,
        "time_ms": 1e3 * time,
        "time_ratio": time / sum(baseline.seconds().values()),
        "note": cost.note,
    }


def training_row(label: str, cost: TrainingCost, baseline: TrainingCost, operations: int = OPERATIONS) -> Row:
    """One method's costs of a step and their ratios to the baseline's."""
    parts = cost.flops(operations)
    total = sum(parts.values())
    memory = cost.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits")
    return {
        "method": label,
        "visual_tokens": cost.image_tokens,
        "tokens_last_layer": cost.lengths[-1],
        **{f"{name}_tflops": parts[name] / 1e12 for name in TRAINING_PARTS},
        "tflops": total / 1e12,
        "flops_ratio": total / sum(baseline.flops(operations).values()),
        **{f"{name}_gb": getattr(memory, name) / 1e9 for name in names},
        "memory_gb": memory.total / 1e9,
        "step_s": cost.seconds,
        "samples_per_s": cost.run.batch / cost.seconds,
        "time_ratio": cost.seconds / baseline.seconds,
        "note": cost.note,
    }


def paper_row(figure: Figure) -> Row:
    """A published figure beside ours."""
    return {
        "paper": figure.paper,
        "place": figure.place,
        "figure": figure.what,
        "unit": figure.unit,
        "published": figure.published,
        "computed": figure.computed,
        "difference": figure.difference,
        "assumed": figure.assumed,
        "gives": figure.refitted,
        "difference_left": figure.left,
    }


# Text ------------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], conventions: Mapping[str, Any], form: str) -> str:
    """Rows with what they assume, as text that ends with a line break.

    Args:
        rows: all with the same keys.
        conventions: what holds for all rows, by name.
        form: one of `FORMATS`.

    Raises:
        ValueError: an unknown format.
    """
    if form == "json":
        return json.dumps({**conventions, "rows": list(rows)}, indent=2) + "\n"
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, [*rows[0], *conventions], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **conventions} for row in rows)
        return text.getvalue()
    if form != "markdown":
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    said = "".join(f"- {key.replace('_', ' ')}: {value}\n" for key, value in conventions.items())
    notes = "".join(f"- {row['method']}: {row['note']}\n" for row in rows if row.get("note"))
    counts = [key for key in rows[0] if key.endswith(("tflops", "flops_ratio"))]
    others = [key for key in rows[0] if key not in (*counts, "note", "method", "visual_tokens", "tokens_last_layer")]
    first, second = ["method", "visual_tokens", "tokens_last_layer", *counts], ["method", *others]
    return f"{said}{notes}\n{markdown(rows, first)}\n{markdown(rows, second)}"


def markdown(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A table of some keys of the rows."""
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [[_cell(row[key]) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def render_papers(figures: Sequence[Figure], form: str) -> str:
    """The papers' figures beside ours, as text that ends with a line break.

    Raises:
        ValueError: an unknown format.
    """
    rows = [paper_row(figure) for figure in figures]
    if form != "markdown":
        return render(rows, {} if form == "csv" else {"conventions": CONVENTIONS}, form)
    return "\n".join(_paper(paper, [row for row in rows if row["paper"] == paper]) for paper in CONVENTIONS)


def _paper(paper: str, rows: Sequence[Row]) -> str:
    """One paper's table; the columns of other assumptions only where there are any."""
    keys = ["place", "figure", "unit", "published", "computed", "difference"]
    if any(row["assumed"] for row in rows):
        keys += ["assumed", "gives", "difference_left"]
    changes = ("difference", "difference_left")
    percent = [
        {**row, **{key: None if row[key] is None else f"{100 * row[key]:+.1f} %" for key in changes}} for row in rows
    ]
    return f"**{paper}.** {CONVENTIONS[paper]}\n\n{markdown(percent, keys)}"
