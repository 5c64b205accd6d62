"""What `scripts/gpu_check.sh` runs on a GPU: the tests marked `gpu`, and `llava bench` at a model's size.

    python -m benchmarks.gpu_check tests --out FOLDER [--minutes 10] [--device cuda] [--select EXPRESSION]
    python -m benchmarks.gpu_check bench --out FOLDER [--minutes 10] [--device cuda] [--model 7b] [--method NAME]

Each writes its JSON and the common report.md after every test or measurement, so that nothing is lost where a time
limit ends it. What no time is left for is named there. On the CPU, it runs the tests' rehearsals.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.cost.bench.report import tables
from llava.cost.bench.run import BASELINE, Plan, run
from llava.cost.bench.workload import Workload
from llava.cost.command import all_methods
from llava.provenance import git_state, versions

ROOT = Path(__file__).resolve().parent.parent
TESTS, BENCH, REPORT = "tests.json", "bench.json", "report.md"
SPARE = 10.0  # seconds of a part that are kept for its end
# The methods that most is known of come first, in case that there is no time for all.
FIRST = ("prumerge", "pyramiddrop", "fastv", "trim", "prumerge_plus", "stf")
KINDS = {"answer": None, "training": "lora"}


class Clock:
    """The time of a part, which begins when the clock is made.

    Args:
        minutes: of all.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes - SPARE

    def has(self, seconds: float = 0.0) -> bool:
        """Whether so many are left."""
        return time.monotonic() + seconds < self._end


def setting(device: str) -> dict[str, Any]:
    """What was checked, on what."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    memory = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None
    return {"device": name, "memory": memory, "versions": versions(), "commit": git_state(ROOT)}


def write(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """A part's JSON, and the report anew."""
    for file, text in ((name, json.dumps(content, indent=1) + "\n"), (REPORT, None)):
        staging = out / f".{file}"
        staging.write_text(report(out) if text is None else text, encoding="utf-8")
        staging.replace(out / file)


# Tests


class Recorder:
    """A plugin of pytest: writes each result as it comes, and stops when the time is over.

    Args:
        out: folder of the results.
        clock: of the part.
        device: that the tests run on.
    """

    def __init__(self, out: Path, clock: Clock, device: str) -> None:
        self._out, self._clock = out, clock
        self.content: dict[str, Any] = {"setting": setting(device), "results": {}, "not_run": []}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._session = session
        self.content["not_run"] = [item.nodeid for item in session.items]
        write(self._out, TESTS, self.content)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.content["results"].setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
        result["seconds"] += report.duration
        if report.outcome != "passed":
            result["outcome"] = report.outcome
            result["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.content["not_run"].remove(nodeid)
        write(self._out, TESTS, self.content)
        if not self._clock.has():
            self._session.shouldstop = "no time is left"


def check_tests(out: Path, clock: Clock, device: str, select: str | None) -> bool:
    """Run the tests; whether all that ran passed, one at least."""
    recorder = Recorder(out, clock, device)
    chosen = ["-m", "gpu" if device.startswith("cuda") else "not gpu", *(["-k", select] if select else [])]
    arguments = [str(ROOT / "tests/test_gpu.py"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-v", *chosen]
    code = pytest.main(arguments, plugins=[recorder])
    counts = Counter(result["outcome"] for result in recorder.content["results"].values())
    return not counts["failed"] and counts["passed"] > 0 and code in (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED)


# Measurements


@dataclass
class Piece:
    """One measurement: a method beside the baseline.

    Attributes:
        kind: one of `KINDS`.
        method: its name.
        value: what `ReductionConfig.parse` reads.
    """

    kind: str
    method: str
    value: str

    @property
    def name(self) -> str:
        """As the report calls it."""
        return f"{self.method}, {self.kind}"


@dataclass
class Sizes:
    """What is measured of each method.

    Attributes:
        model: as `llava bench` takes it.
        device, dtype: where and in what.
        answers, samples: batch sizes of answers and of a training step.
        rounds: turns that count.
        work: of a request or sample.
    """

    model: str
    device: str
    dtype: torch.dtype
    answers: Sequence[int] = (1, 8)
    samples: Sequence[int] = (4,)
    rounds: int = 3
    work: Workload = field(default_factory=Workload)

    def plan(self, piece: Piece, out: Path) -> Plan:
        """The measurement, with a trace of it."""
        trains = KINDS[piece.kind]
        return Plan(
            model=self.model,
            methods={piece.method: piece.value},
            batches=self.answers if trains is None else self.samples,
            work=self.work,
            rounds=self.rounds,
            trains=trains,
            device=self.device,
            dtype=self.dtype,
            trace=out / "traces" / piece.kind,
        )


def pieces(methods: Iterable[str] | None) -> list[Piece]:
    """All measurements, the most telling first.

    Raises:
        ValueError: an unknown method.
    """
    known = all_methods()
    unknown = sorted(set(methods or ()) - known.keys())
    if unknown:
        raise ValueError(f"--method {', '.join(unknown)}: choose of {', '.join(known)}")
    names = list(methods) if methods else [*FIRST, *(name for name in known if name not in FIRST)]
    return [Piece(kind, name, known[name]) for name in names for kind in KINDS]


def check_speed(out: Path, clock: Clock, sizes: Sizes, wanted: Sequence[Piece]) -> bool:
    """Measure as much as there is time for; whether nothing failed, and one measurement came out."""
    content: dict[str, Any] = {"setting": setting(sizes.device), "results": {}, "failed": {}, "not_run": []}
    longest = dict.fromkeys(KINDS, 0.0)
    content["not_run"] = [piece.name for piece in wanted]
    for piece in wanted:
        if not clock.has(1.2 * longest[piece.kind]):
            continue
        print(f"{piece.name} ...", flush=True)
        start = time.monotonic()
        try:
            content["results"][piece.name] = {"kind": piece.kind, **run(sizes.plan(piece, out))}
        except Exception as error:  # noqa: BLE001 - whatever fails, the next one is measured
            content["failed"][piece.name] = "".join(traceback.format_exception(error, limit=-3)).strip()
        longest[piece.kind] = max(longest[piece.kind], time.monotonic() - start)
        content["not_run"].remove(piece.name)
        write(out, BENCH, content)
        gc.collect()
        if sizes.device.startswith("cuda"):
            torch.cuda.empty_cache()
    write(out, BENCH, content)
    return bool(content["results"]) and not content["failed"]


# The report


def report(out: Path) -> str:
    """Markdown of what the parts have written so far."""
    parts = ["# GPU check"]
    tests, bench = (json.loads((out / name).read_text()) if (out / name).is_file() else None for name in (TESTS, BENCH))
    if tests or bench:
        parts.append(_heading((tests or bench)["setting"]))
    if tests:
        parts += ["## Tests", *_tests(tests)]
    if bench:
        parts += ["## Speed", *_speed(bench)]
    return "\n\n".join(parts) + "\n"


def _heading(setting: Mapping[str, Any]) -> str:
    memory = "" if setting["memory"] is None else f", {setting['memory'] / 2**30:.0f} GiB"
    shown = ", ".join(f"{name} {version}" for name, version in setting["versions"].items() if version)
    commit = (setting["commit"] or {}).get("commit", "unknown")
    return f"{setting['device']}{memory}; {shown}; commit {commit}"


def _tests(content: Mapping[str, Any]) -> list[str]:
    results = content["results"]
    counts = Counter(result["outcome"] for result in results.values())
    not_run = content["not_run"]
    left = f"; {len(not_run)} not run, for want of time: from {_short(not_run[0])} on" if not_run else ""
    parts = [", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")) + left + "."]
    skipped = Counter(result["why"].removeprefix("Skipped: ") for result in results.values() if result["why"])
    skipped = Counter({why: n for why, n in skipped.items() if "\n" not in why and not why.startswith("Failed")})
    if skipped:
        parts.append("\n".join(f"- skipped {number}: {why}" for why, number in skipped.items()))
    for name, result in results.items():
        if result["outcome"] == "failed":
            parts += [f"### {_short(name)}", _fenced(result["why"])]
    return parts


def _short(name: str) -> str:
    return f"`{name.partition('::')[2]}`"


def _speed(content: Mapping[str, Any]) -> list[str]:
    parts = []
    for kind in KINDS:
        found = [result for result in content["results"].values() if result["kind"] == kind]
        if found:
            parts.append(tables({"setting": found[0]["setting"], "rows": _merged(found)}).strip())
            parts.append("The baseline is that of the first measurement; ratios are of each method's own.")
    if content["not_run"]:
        parts.append(f"Not run, for want of time: {'; '.join(content['not_run'])}.")
    for name, why in content["failed"].items():
        parts += [f"### {name}: failed", _fenced(why)]
    return parts


def _merged(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of several measurements, the baseline's once, by batch size."""
    rows = [row for row in results[0]["rows"] if row["method"] == BASELINE]
    rows += [row for result in results for row in result["rows"] if row["method"] != BASELINE]
    return sorted(rows, key=lambda row: row["batch"])


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tests", "bench"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10, help="of this part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--select", help="of the tests, as pytest's -k")
    parser.add_argument("--model", default="7b", help="as llava bench takes it")
    parser.add_argument("--method", action="append", help="only this one; may be given again")
    parser.add_argument("--rounds", type=int, default=3, help="turns that count")
    parser.add_argument("--batch", help="of answers and of training, such as 1,8/4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.minutes)
    if options.part == "tests":
        sys.exit(not check_tests(options.out, clock, options.device, options.select))
    on_gpu = options.device.startswith("cuda")
    half = "bfloat16" if on_gpu and torch.cuda.get_device_capability() >= (8, 0) else "float16"
    dtype = getattr(torch, options.dtype or (half if on_gpu else "float32"))
    sizes = Sizes(options.model, options.device, dtype, rounds=options.rounds)
    if options.batch:
        answers, _, samples = options.batch.partition("/")
        sizes.answers, sizes.samples = ([int(one) for one in text.split(",")] for text in (answers, samples))
    sys.exit(not check_speed(options.out, clock, sizes, pieces(options.method)))


if __name__ == "__main__":
    main()
