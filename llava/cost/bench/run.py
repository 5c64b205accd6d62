"""`llava bench`: methods beside the baseline, by turns in one run, and what they save beside what FLOPs promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llava.cost.bench.causes import Causes, find_causes
from llava.cost.bench.subject import Method, Subject, open_subject
from llava.cost.bench.timing import Spread, by_turns
from llava.cost.bench.workload import Answering, Training, Workload
from llava.cost.devices import peak_flops
from llava.cost.question import PARTS, Scenario, question_cost
from llava.cost.training import TrainingRun, training_cost
from llava.provenance import git_state, versions
from llava.reduction.config import ReductionConfig

BASELINE = "none"
PREFILL_PARTS = tuple(part for part in PARTS if part != "decoding")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to time.

    Attributes:
        model: see `open_subject`.
        methods: by the name in the table, what `ReductionConfig.parse` reads; the baseline comes by itself.
        batches: requests at once, one measurement each.
        work: what a request holds; its batch is not read.
        rounds: turns that count.
        trains: None times answers; "lora" or "all" a training step.
        device, dtype, attention, vision_tower: see `open_subject`.
        trace: folder for a timeline of each method; None writes none.
    """

    model: str
    methods: Mapping[str, Any] = field(default_factory=dict)
    batches: Sequence[int] = (1, 8, 32)
    work: Workload = field(default_factory=Workload)
    rounds: int = 5
    trains: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    vision_tower: str | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: must be at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch={','.join(map(str, self.batches))}: expected sizes of at least 1")
        if self.trains not in (None, "all", "lora"):
            raise ValueError(f"train={self.trains!r}: choose lora or all")


@dataclass(frozen=True)
class Row:
    """One method at one batch size.

    Attributes:
        method: its name.
        batch: requests, or samples, at once.
        measured: each measurement.
        flops: by part, of the whole batch.
        image_tokens: of a request, as they entered the language model.
        causes: where the time went, by the profiler; at the first batch size only.
    """

    method: str
    batch: int
    measured: dict[str, Spread]
    flops: dict[str, float]
    image_tokens: float
    causes: Causes | None = None

    @property
    def time(self) -> float:
        """Median seconds up to the first token, or of a training step."""
        return self.measured["step" if "step" in self.measured else "first_token"].median

    @property
    def work(self) -> float:
        """FLOPs of what `time` is the time of."""
        return sum(value for part, value in self.flops.items() if part != "decoding")


def run(plan: Plan) -> dict[str, Any]:
    """Time all methods.

    Returns:
        Plain data: `setting`, and `rows` as `Row` with `speedup`, `promised` and `beyond`.

    Raises:
        ValueError: the model can't be opened, or a method does not suit it; the method is named.
    """
    reductions = {BASELINE: ReductionConfig.parse(None)}
    reductions |= {name: ReductionConfig.parse(value) for name, value in plan.methods.items()}
    device = torch.device(plan.device)
    subject = open_subject(plan.model, reductions.values(), device, plan.dtype, plan.attention, plan.vision_tower)
    methods = [_prepare(subject, name, reduction) for name, reduction in reductions.items()]
    if plan.trains is not None:
        subject.learn(plan.trains, methods)
    rows: list[Row] = []
    for batch in plan.batches:
        rows += _time(plan, subject, methods, replace(plan.work, batch=batch), profiled=batch == plan.batches[0])
    setting = _setting(plan, subject.model)
    return {"setting": setting, "rows": [_with_ratios(row, rows, setting["peak_flops"]) for row in rows]}


def _prepare(subject: Subject, name: str, reduction: ReductionConfig) -> Method:
    try:
        return subject.prepare(name, reduction)
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from error


def _time(plan: Plan, subject: Subject, methods: Sequence[Method], work: Workload, profiled: bool) -> list[Row]:
    timed = {method.name: _timed(subject, method, work) for method in methods}
    found = by_turns({method.name: _in_turn(subject, method, timed[method.name]) for method in methods}, plan.rounds)
    rows = []
    for method in methods:
        measured = {key: Spread.of(values) for key, values in found[method.name].items()}
        images = measured.pop("image_tokens").median
        flops = _promise(plan, subject.model, method, work, images)
        causes = _causes(plan, subject, method, timed[method.name]) if profiled else None
        rows.append(Row(method.name, work.batch, measured, flops, images, causes))
    return rows


def _timed(subject: Subject, method: Method, work: Workload) -> Answering | Training:
    subject.use(method)
    if subject.optimizer is None:
        return Answering(subject.model, method.reducers, work)
    return Training(subject.model, method.reducers, work, subject.optimizer)


def _in_turn(subject: Subject, method: Method, timed: Answering | Training) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        subject.use(method)
        return timed()

    return once


def _causes(plan: Plan, subject: Subject, method: Method, timed: Answering | Training) -> Causes:
    subject.use(method)
    trace = None if plan.trace is None else plan.trace / f"{method.name}.json"
    run = timed.first_token if isinstance(timed, Answering) else timed.step
    return find_causes(run, subject.model.device, trace)


def _promise(plan: Plan, model: Any, method: Method, work: Workload, image_tokens: float) -> dict[str, float]:
    """FLOPs of the whole batch by part, at the visual tokens that were counted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shape: dict[str, Any] = {"images": work.images, "tiles": work.tiles, "text_tokens": work.text_tokens}
    shape |= {"batch": work.batch, "image_tokens": image_tokens}
    if plan.trains is None:
        cost = question_cost(base, method.reduction, Scenario(new_tokens=work.new_tokens, **shape))
        return cost.flops()
    trained = TrainingRun(trains=plan.trains, head_rows=work.learnt_tokens, **shape)
    return {part: 2.0 * macs for part, macs in training_cost(base, method.reduction, trained).macs.items()}


def _setting(plan: Plan, model: Any) -> dict[str, Any]:
    device = torch.device(plan.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "model": plan.model,
        "device": name,
        "peak_flops": peak_flops(name),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "trains": plan.trains,
        "rounds": plan.rounds,
        **{key: value for key, value in asdict(plan.work).items() if key != "batch"},
        "versions": versions(),
        "commit": git_state(Path(__file__).resolve().parent),
    }


def _with_ratios(row: Row, rows: Sequence[Row], peak: float | None) -> dict[str, Any]:
    """A row as plain data, beside the baseline at the same batch size.

    `speedup` is measured, `promised` that of the FLOPs; `beyond` says by cause what the time is beyond the promise.
    """
    base = next(other for other in rows if other.method == BASELINE and other.batch == row.batch)
    beyond = None
    if row.causes is not None and base.causes is not None:
        beyond = row.causes.beyond(base.causes, row.work / base.work)
    return {
        "method": row.method,
        "batch": row.batch,
        "image_tokens": row.image_tokens,
        "flops": row.flops,
        "measured": {key: asdict(spread) for key, spread in row.measured.items()},
        "speedup": base.time / row.time,
        "promised": base.work / row.work,
        "utilization": None if peak is None else row.work / row.time / peak,
        "causes": None if row.causes is None else asdict(row.causes),
        "beyond": beyond,
    }
