"""The papers' tables: a CSV with a line for each figure, and a YAML that says what each table is, in `papers/`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llava.yaml_text import read_yaml

FOLDER = Path(__file__).parent / "papers"
PAPERS = (
    *("prumerge", "prumerge_v1", "trim", "stf", "pyramiddrop", "restore", "v2drop", "sparsevlm", "dart", "divprune"),
    *("mmtok", "holov", "vscan", "m3", "tokenpacker", "fastvlm", "autoprune", "cen_prune", "eadp"),
)
OTHERS = ("", "re-run", "copied")
KINDS = ("main", "ablation", "efficiency", "video")
COLUMNS = [
    *("table", "model", "backbone", "resolution", "method", "tokens", "trained", "copied_from"),
    *("benchmark", "value"),
]
UNREDUCED = "none"
"""The method of a row whose model gets all its visual tokens."""
AVERAGE = "average"
"""A table's own mean over its benchmarks."""

# Our names of the methods, as the papers write them; the others are written alike.
METHOD_NAMES = {
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "trim": "TRIM",
    "stf": "STF",
    "avgpool": "AvgPool",
    "token_concat": "TokenConcat",
    "pyramiddrop": "PyramidDrop",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "tome": "ToMe",
    "evit": "EViT",
    "ats": "ATS",
    "visionzip": "VisionZip",
    "fastervlm": "FasterVLM",
    "vispruner": "VisPruner",
    "vscan": "VScan",
    "divprune": "DivPrune",
    "cdpruner": "CDPruner",
    "mmtok": "MMTok",
    "holov": "HoloV",
    "tokenpacker": "TokenPacker",
    "mqt": "MQT",
    "m3": "M3",
    "dart": "DART",
}

BENCHMARKS = (
    *("VQAv2", "GQA", "VizWiz", "ScienceQA-IMG", "TextVQA", "POPE", "POPE-random", "POPE-popular", "POPE-adversarial"),
    *("MME", "MME-cognition", "MME-sum", "MMBench", "MMBench-CN", "SEED", "SEED-IMG", "LLaVA-Bench", "MM-Vet"),
    *("MMStar", "DocVQA", "InfoVQA", "ChartQA", "OCRVQA", "Q-Bench", "MMMU", "OCRBench"),
    *("MSVD-QA", "MSVD-QA score", "MSRVTT-QA", "MSRVTT-QA score", "ActivityNet-QA", "ActivityNet-QA score"),
)
"""One spelling for all papers."""
# Best possible score, where it is not 100.
FULL_SCORE = {
    **{"MME": 2000, "MME-cognition": 800, "MME-sum": 2800},
    **{name: 5 for name in BENCHMARKS if name.endswith(" score")},
}
# Figures that are no score: what a model costs.
COSTS = (
    *("FLOPs (T)", "prefill (ms)", "memory (GB)", "activation (GB)", "GPU hours"),
    *(f"sequence length, stage {stage} (tokens)" for stage in range(1, 5)),
)


def in_percent(benchmark: str, value: float) -> float:
    """A score as a share of the best possible one, so that scores can be averaged."""
    return 100 * value / FULL_SCORE.get(benchmark, 100)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a paper's table.

    Attributes:
        paper: one of `PAPERS`.
        table: its number, as the paper has it.
        model: with its size, and what sets it apart from another of the table.
        backbone: the language model; empty where the paper does not say.
        resolution: of the pictures, in pixels or in tiles ("5 patches"); may be empty.
        method: the token reduction, under the paper's name, `UNREDUCED` for none.
        tokens: visual tokens of an image on average; None where the paper does not say.
        trained: whether the model was trained with the method; None where that is not said, or there is none.
        copied_from: the work from which the paper took the figure over; None for its own.
        benchmark: or cost, of `BENCHMARKS`, `COSTS` or `AVERAGE`.
        printed: the number as it is printed.
    """

    paper: str
    table: str
    model: str
    backbone: str
    resolution: str
    method: str
    tokens: float | None
    trained: bool | None
    copied_from: str | None
    benchmark: str
    printed: str

    @property
    def value(self) -> float:
        """The number."""
        return float(self.printed)

    @property
    def key(self) -> tuple[object, ...]:
        """What no other figure of the paper shares."""
        return (self.table, self.model, self.resolution, self.method, self.tokens, self.benchmark)

    @property
    def is_score(self) -> bool:
        """Whether it is a benchmark's score, no cost and no mean."""
        return self.benchmark in BENCHMARKS


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper: see the YAML files for the fields' meaning."""

    number: str
    title: str
    kind: str
    setting: str
    notes: tuple[str, ...]
    figures: tuple[Figure, ...] = field(repr=False)


@dataclass(frozen=True)
class Paper:
    """A paper with its tables, in its own order.

    Attributes:
        name: one of `PAPERS`.
        title, arxiv, venue: where it is found.
        notes: on all tables.
        tables: those with results that are here.
        own: the methods that it presents, under its names.
        others: whether rows of other papers' methods are "re-run" or "copied"; empty where the paper does not say. A
            figure with `copied_from` is copied in any case.
        options: by method and number of tokens, what `--reduction` is told for the same setting, where that is known.
    """

    name: str
    title: str
    arxiv: str
    venue: str
    notes: tuple[str, ...]
    tables: tuple[PaperTable, ...]
    own: tuple[str, ...] = ()
    others: str = ""
    options: Mapping[str, Mapping[float, Any]] = field(default_factory=dict, repr=False)

    def table(self, number: str) -> PaperTable:
        """The table of this number.

        Raises:
            ValueError: there is none; the known ones are listed.
        """
        for table in self.tables:
            if table.number == number:
                return table
        known = ", ".join(table.number for table in self.tables)
        raise ValueError(f"paper {self.name} has no table {number!r} with results; it has: {known}")


@cache
def load_paper(name: str) -> Paper:
    """A paper's tables.

    Raises:
        ValueError: there is no such paper (the known ones are listed), or its files are not as they should be.
    """
    if name not in PAPERS:
        raise ValueError(f"no paper {name!r}; known: {', '.join(PAPERS)}")
    about = read_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    figures = list(read_figures(FOLDER / f"{name}.csv"))
    numbers = list(dict.fromkeys(figure.table for figure in figures))
    if sorted(numbers) != sorted(about["tables"]):
        raise ValueError(f"{FOLDER / name}.yaml describes the tables {sorted(about['tables'])}, the CSV has {numbers}")
    tables = tuple(_table(number, about["tables"][number], figures) for number in about["tables"])
    others = about.get("others", "")
    if others not in OTHERS:
        raise ValueError(f"{FOLDER / name}.yaml: others is {others!r}; expected re-run, copied or nothing")
    notes = tuple(about.get("notes", ()))
    own, options = tuple(about.get("own", ())), about.get("options", {})
    return Paper(name, about["title"], about["arxiv"], about["venue"], notes, tables, own, others, options)


def _table(number: str, about: dict[str, Any], figures: list[Figure]) -> PaperTable:
    if about["kind"] not in KINDS:
        raise ValueError(f"table {number}: kind {about['kind']!r} is none of {', '.join(KINDS)}")
    own = tuple(figure for figure in figures if figure.table == number)
    return PaperTable(number, about["title"], about["kind"], about["setting"], tuple(about.get("notes", ())), own)


def read_figures(file: Path) -> Iterator[Figure]:
    """The figures of a CSV file with `COLUMNS`; the paper is the file's name.

    Raises:
        ValueError: another header, an entry that is not what it should be, or a figure that stands there twice; file
            and line are named.
    """
    seen: set[tuple[object, ...]] = set()
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{file}: the header should be {','.join(COLUMNS)}")
        for row in reader:
            try:
                figure = _figure(file.stem, row)
                if figure.key in seen:
                    raise ValueError("the same figure stands in an earlier line")
            except ValueError as error:
                raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
            seen.add(figure.key)
            yield figure


def _figure(paper: str, row: dict[str, str]) -> Figure:
    if None in row or None in row.values():
        raise ValueError(f"expected {len(COLUMNS)} entries")
    for name in ("table", "model", "method"):
        if not row[name]:
            raise ValueError(f"'{name}' is empty")
    if row["benchmark"] not in (*BENCHMARKS, *COSTS, AVERAGE):
        raise ValueError(f"unknown benchmark {row['benchmark']!r}")
    if row["trained"] not in ("yes", "no", ""):
        raise ValueError(f"'trained' is {row['trained']!r}; expected yes, no or nothing")
    if not float(row["value"]) >= 0:
        raise ValueError(f"the value {row['value']} is below 0")
    return Figure(
        paper=paper,
        table=row["table"],
        model=row["model"],
        backbone=row["backbone"],
        resolution=row["resolution"],
        method=row["method"],
        tokens=float(row["tokens"]) if row["tokens"] else None,
        trained={"yes": True, "no": False}.get(row["trained"]),
        copied_from=row["copied_from"] or None,
        benchmark=row["benchmark"],
        printed=row["value"],
    )
