"""Run the fuzz: `python -m tests.fuzz --minutes 10 --seed 1 [--only AREA] [--case N] [--report FILE]`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import checkpoints, data, places, settings, signals
from tests.fuzz.case import Case, World
from tests.fuzz.processes import start_server

AREAS: dict[str, Callable[[Case], None]] = {
    "settings": settings.fuzz,
    "data": data.fuzz,
    "checkpoints": checkpoints.fuzz,
    "places": places.fuzz,
    "signals": signals.fuzz,
    "together": signals.fuzz_together,
}


def run_case(world: World, seed: int, area: str, number: int) -> dict[str, Any]:
    """One case as a line of the report."""
    began = time.monotonic()
    case = Case(world, seed, area, number)
    try:
        AREAS[area](case)
    except Exception as error:  # noqa: BLE001  # of the fuzz itself: the others go on
        case.blame(f"the fuzz fails: {type(error).__name__}: {error}"[:500])
    return {
        "area": area,
        "case": number,
        "seed": seed,
        "problems": case.problems,
        "outcomes": case.outcomes,
        "said": case.said,
        "seconds": round(time.monotonic() - began, 1),
        "printed": case.tail if case.problems else "",
    }


def fuzz(root: Path, seed: int, areas: list[str], first: int = 0) -> Iterator[dict[str, Any]]:
    """Cases of the areas by turns, without end.

    Args:
        root: an empty folder.
        seed: of all cases.
        areas: keys of `AREAS`.
        first: number of the first case of each area.
    """
    start_server()
    world = World.make(root)
    for number in itertools.count(first):
        for area in areas:
            yield run_case(world, seed, area, number)


def summary(lines: list[dict[str, Any]]) -> str:
    """A table of areas, and of problems with a command that shows each again."""
    rows = ["area          cases  with problems"]
    for area in AREAS:
        own = [line for line in lines if line["area"] == area]
        rows.append(f"{area:12}  {len(own):5}  {sum(bool(line['problems']) for line in own):5}")
    outcomes = Counter(code for line in lines for code in line["outcomes"])
    rows.append(f"exit codes: {dict(sorted(outcomes.items(), key=str))}")
    for line in lines:
        if line["problems"]:
            again = f"--seed {line['seed']} --only {line['area']} --case {line['case']}"
            rows.append(f"{again}: {'; '.join(dict.fromkeys(line['problems']))}\n    {' | '.join(line['said'])}"[:600])
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--case", type=int, help="this number only")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--report", type=Path, help="file that gets a JSON line for each case")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    first = options.first if options.case is None else options.case
    lines: list[dict[str, Any]] = []
    report_file = options.report or Path(os.devnull)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root, report_file.open("w", encoding="utf-8") as report:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/cache"
        for line in fuzz(Path(root), options.seed, options.only, first):
            lines.append(line)
            print(json.dumps(line), file=report, flush=True)
            if len(lines) == len(options.only) if options.case is not None else time.monotonic() > end:
                break
    print(summary(lines))
    if options.case is not None:
        print(*(line["printed"] for line in lines), sep="\n")
    return int(any(line["problems"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
