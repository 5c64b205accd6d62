"""Compare the losses of two runs, step by step, from their metrics.jsonl.

    python scripts/compare_losses.py RUN RUN [--plot losses.png] [--key loss] [--tolerance 1e-3]

RUN is an output folder or its metrics.jsonl. Prints a table of steps and a summary. With --tolerance the exit code is 1
where a step that both runs have differs by more, or is not finite in either. --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

METRICS_FILE = "metrics.jsonl"
Losses = dict[int, float]


def read_losses(run: Path, key: str = "loss") -> Losses:
    """Values by step, in rising order; of a step that stands there twice the last counts.

    Args:
        run: an output folder, or the file itself.
        key: which entry of a line; null is NaN.

    Raises:
        ValueError: there is no such file, a line of it is no JSON object, or none has the key.
    """
    file = run / METRICS_FILE if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"{file} does not exist: name a run's output folder, or its {METRICS_FILE}")
    losses: Losses = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if key in record:
                losses[int(record["step"])] = _number(record[key])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: not a line of a run's log: {line[:80]!r}") from error
    if not losses:
        raise ValueError(f"{file}: no line has the key {key!r}")
    return dict(sorted(losses.items()))


def _number(value: object) -> float:
    return math.nan if value is None else float(str(value))


def difference(first: float, second: float) -> float:
    """How far two values lie apart; infinity where one is not finite."""
    return abs(first - second) if math.isfinite(first) and math.isfinite(second) else math.inf


def some_of(steps: list[int], rows: int) -> list[int]:
    """At most `rows` steps, evenly spaced, the first and the last among them."""
    if len(steps) <= rows:
        return steps
    return sorted({steps[(i * (len(steps) - 1) + (rows - 1) // 2) // (rows - 1)] for i in range(rows)})


def table_of(first: Losses, second: Losses, steps: Iterable[int], names: tuple[str, str]) -> Table:
    """The values of both runs at these steps."""
    table = Table("step", *names, "difference", box=None)
    for step in steps:
        gap = difference(first[step], second[step])
        table.add_row(str(step), f"{first[step]:.6g}", f"{second[step]:.6g}", f"{gap:.3g}")
    return table


def summary(first: Losses, second: Losses, common: list[int], tolerance: float | None) -> str:
    """In words: how far the runs lie apart, and from which step on."""
    gaps = {step: difference(first[step], second[step]) for step in common}
    widest = max(gaps, key=lambda step: gaps[step])
    mean = sum(gaps.values()) / len(gaps)
    only = f"{len(first) - len(common)} and {len(second) - len(common)} steps stand in one run only"
    lines = [
        f"{len(common)} steps in both; {only}",
        f"difference: mean {mean:.3g}, widest {gaps[widest]:.3g} at {widest}",
    ]
    if tolerance is not None:
        apart = [step for step, gap in gaps.items() if gap > tolerance]
        lines.append(
            f"{len(apart)} steps differ by more than {tolerance:g}, the first is {apart[0]}"
            if apart
            else f"no step differs by more than {tolerance:g}"
        )
    return "\n".join(lines)


def plot(first: Losses, second: Losses, names: tuple[str, str], key: str, file: Path) -> None:
    """Both curves, and their difference below.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, losses in zip(names, (first, second), strict=True):
        above.plot(list(losses), list(losses.values()), label=name, linewidth=1)
    common = [step for step in first if step in second]
    below.plot(common, [first[step] - second[step] for step in common], color="black", linewidth=1)
    above.set_ylabel(key)
    above.legend()
    below.set_ylabel("first - second")
    below.set_xlabel("step")
    figure.savefig(file)


def compare(arguments: argparse.Namespace) -> int:
    """Print and plot; the exit code."""
    runs: tuple[Path, Path] = (arguments.first, arguments.second)
    first, second = (read_losses(run, arguments.key) for run in runs)
    common = [step for step in first if step in second]
    if not common:
        raise ValueError(f"{runs[0]} and {runs[1]} have no step in common")
    names = (str(runs[0]), str(runs[1]))
    console = Console(soft_wrap=True)
    console.print(table_of(first, second, some_of(common, arguments.rows), names))
    console.print(summary(first, second, common, arguments.tolerance), highlight=False)
    if arguments.plot is not None:
        plot(first, second, names, arguments.key, arguments.plot)
    if arguments.tolerance is None:
        return 0
    return int(any(difference(first[step], second[step]) > arguments.tolerance for step in common))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare the losses of two runs.")
    parser.add_argument("first", type=Path, help=f"output folder of a run, or its {METRICS_FILE}")
    parser.add_argument("second", type=Path, help="the other")
    parser.add_argument("--key", default="loss", help="entry to compare, e.g. grad_norm")
    parser.add_argument("--rows", type=int, default=20, help="at most so many rows in the table, 2 or more")
    parser.add_argument("--tolerance", type=float, help="exit with 1 where a step differs by more")
    parser.add_argument("--plot", type=Path, help="picture to draw, e.g. losses.png")
    arguments = parser.parse_args()
    if arguments.rows < 2:
        parser.error("--rows: 2 or more")
    try:
        sys.exit(compare(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
