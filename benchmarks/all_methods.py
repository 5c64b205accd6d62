"""All methods at the same number of visual tokens: what a choice takes, what an answer costs, what papers report.

    python -m benchmarks.all_methods [--budget 192,128,64] [--model 7b] [--batch 1] [--rounds 3]

For each budget a table: the options that the method resolves it to, the tokens that a layer of the language model sees
in the mean, TFLOPs of prefill and vision tower for `--model` by formula, and on the clock, with random weights of
`--timed`, the selection (also as a share of the tower) and the time to the first token, beside what FLOPs promise.
The last columns are published accuracies of LLaVA-1.5-7B at that label, in percent of the full model's on the
benchmarks of the same table, with the number of the source in the list at the end. Methods that can't be told a budget
are listed with the reason. All of it is Markdown, for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from llava.cost.bench.run import BASELINE, Plan, run
from llava.cost.bench.workload import Workload
from llava.cost.question import Scenario, methods, question_cost
from llava.cost.sizes import open_model
from llava.eval.reports import by_budget
from llava.reduction.budget import ModelShape, without_notes
from llava.reduction.options import values_of
from llava.reduction.registry import available, method_class
from llava.reduction.stand_in import TowerShape

HEADER = (
    *("method", "options", "tokens a layer", "TFLOPs", "selection, ms", "of the tower, %"),
    *("first token, ms", "faster", "promised", "own, %", "re-run, %", "copied or not said, %"),
)
ORIGINS = (("own",), ("re-run",), ("copied", "not said"))
"""Whose figures the last three columns hold."""


class Sources:
    """Numbers of the tables that published figures come from, in the order in which they are named."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def number(self, name: str) -> int:
        """That of a source, from 1."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name) + 1


def asked_for(model: Any, budget: float) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every method that can be told the budget on a model, resolved to its own options; and why the others can't."""
    found: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for site, names in available().items():
        for name in names:
            try:
                reducers, _ = methods({"name": name, "budget": budget}, model=model)
                own = {key: value for key, value in values_of(getattr(reducers, site)).items() if value is not None}
                found[name] = {"name": name, **own}
            except ValueError as error:
                refused[name] = str(error).removeprefix(f"method '{name}': ")
    return found, refused


def told(name: str, resolved: Mapping[str, Any]) -> str:
    """The options that the budget became."""
    named = method_class(name).budget_choices(576)[0]
    return ", ".join(f"{key}={resolved[key]}" for key in named if key in resolved)


def rows_at(
    budget: float, model: Any, timed: Any, arguments: argparse.Namespace
) -> tuple[list[list[str]], dict[str, str]]:
    """Cells of `HEADER` for each method at a budget, and the methods that can't be told it."""
    known, refused = asked_for(model, budget)
    on_clock, _ = asked_for(timed, budget)
    shape = ModelShape(TowerShape.of(model.get_model().get_vision_tower()), model.config.num_hidden_layers)
    plan = Plan(
        model=arguments.timed,
        # A model of fewer layers may not meet it: then the options are those of the larger one.
        methods={name: on_clock.get(name, known[name]) for name in known},
        batches=[arguments.batch],
        work=Workload(text_tokens=60, new_tokens=1),
        rounds=arguments.rounds,
        device=arguments.device,
    )
    measured = {row["method"]: row for row in run(plan)["rows"]}
    tower = measured[BASELINE]["measured"]["tower"]["median"]
    rows = [_row(BASELINE, "", model, None, shape, measured, tower)]
    rows += [_row(name, told(name, known[name]), model, known[name], shape, measured, tower) for name in known]
    return rows, refused


def _row(
    name: str,
    options: str,
    model: Any,
    reduction: Any,
    shape: ModelShape,
    measured: Mapping[str, Any],
    tower: float,
) -> list[str]:
    reducers, _ = methods(reduction, model=model)
    flops = question_cost(model, reduction, Scenario(new_tokens=1)).flops()
    cells = [f"`{name}`", options, f"{shape.mean_tokens(reducers):.4g}", f"{sum(flops.values()) / 1e12:.3g}"]
    row = measured[name]
    selection = row["measured"].get("reduction")
    own = None if selection is None else selection["median"]
    choice = ["-", "-"] if own is None else [f"{1e3 * own:.1f}", f"{100 * own / tower:.2f}"]
    first = 1e3 * row["measured"]["first_token"]["median"]
    return [*cells, *choice, f"{first:.0f}", f"{row['speedup']:.2f}", f"{row['promised']:.2f}"]


def published(name: str, label: float, sources: Sources) -> list[str]:
    """Three cells: what papers print of a method at so many tokens by their own count, by origin (`ORIGINS`).

    Means of what the full model scores, in percent, and the number of the source. A mark is the paper's: a variant.
    """
    if name == BASELINE:
        return ["", "", ""]
    rows = [row for row in by_budget.published(name, label) if row.kept is not None]
    return [
        ", ".join(
            f"{row.kept:.1f}{row.printed[-1] if row.printed[-1] in '‡†' else ''} [{sources.number(row.source)}]"
            for row in rows
            if row.origin in origins
        )
        for origins in ORIGINS
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="192,128,64")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--timed", default="benchmarks/small.json")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    model, timed = open_model(arguments.model), open_model(arguments.timed)
    sources = Sources()
    for budget in map(float, arguments.budget.split(",")):
        with without_notes():
            rows, refused = rows_at(budget, model, timed, arguments)
        rows = [[*row, *published(row[0].strip("`"), budget, sources)] for row in rows]
        print(f"### {budget:g} visual tokens a layer\n\n{table(HEADER, rows)}\n")
        print("\n".join(f"- `{name}`: {reason}" for name, reason in refused.items()), end="\n\n" if refused else "")
    print("\n".join(f"{number}. {name}" for number, name in enumerate(sources.names, start=1)))


if __name__ == "__main__":
    main()
