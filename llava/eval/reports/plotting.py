"""Score against visual tokens and against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.reports.comparison import common_tasks, mean_score
from llava.eval.reports.measured import Result, Run
from llava.eval.reports.published import UNREDUCED
from llava.eval.reports.sheets import mean_of
from llava.files import atomic_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES: dict[str, Callable[[Result], float | None]] = {
    "visual tokens of an image": lambda result: result.tokens,
    "FLOPs of a question": lambda result: result.flops,
}
MARKERS = "soD^vP*Xpd"


def plot(runs: Sequence[Run], file: Path, notes: Sequence[str] = ()) -> None:
    """Write a picture with a point for each run; a panel for each cost that the results have.

    Args:
        runs: all; the score is the mean over the tasks that they share.
        file: its suffix says the format, such as .png, .pdf or .svg.
        notes: sentences below, such as what the runs do not share.

    Raises:
        ValueError: matplotlib is not installed, it has no such format, the runs share no task with a score, or no
            result holds tokens or FLOPs.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ValueError("--plot needs matplotlib, which the extra 'plots' has: pip install llava[plots]") from error
    tasks = common_tasks(runs)
    if not tasks:
        raise ValueError("--plot: the runs have no task in common that has a score")
    costs = {name: [mean_of([cost(run.results[t]) for t in tasks]) for run in runs] for name, cost in AXES.items()}
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    if not costs:
        raise ValueError("--plot: no result holds visual tokens or FLOPs; evaluate the runs again")
    scores = [mean_score(run, tasks) for run in runs]
    figure = Figure(figsize=(4.5 * len(costs) + 2.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for panel, (name, values) in zip(panels, costs.items(), strict=True):
        _draw(panel, runs, values, scores)
        panel.set_xlabel(name)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 3T, as small models have 3G
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    panels[0].set_ylabel(f"{tasks[0]}, % of full score" if len(tasks) == 1 else f"mean over {len(tasks)} tasks, %")
    if notes:
        figure.supxlabel("\n".join(notes), fontsize="x-small", color="tab:red", wrap=True)
    with atomic_folder(file.absolute().parent) as staging:
        figure.savefig(staging / file.name, dpi=150)


def _draw(panel: Axes, runs: Sequence[Run], costs: Sequence[float | None], scores: Sequence[float]) -> None:
    """A point for each run that has the cost; full models are black, with a line at their score."""
    for place, (run, cost, value) in enumerate(zip(runs, costs, scores, strict=True)):
        full = run.method == UNREDUCED
        color, shape = "black" if full else f"C{place % 10}", MARKERS[place % len(MARKERS)]
        # One without the cost is drawn as nothing, for the panels share their legend.
        panel.plot([] if cost is None else [cost], [] if cost is None else [value], shape, color=color, label=run.name)
        if full:
            panel.axhline(value, color="gray", linewidth=0.8, linestyle="--", zorder=0)
    panel.set_xlim(left=0)
    panel.margins(x=0.1, y=0.15)
    panel.grid(alpha=0.3)
