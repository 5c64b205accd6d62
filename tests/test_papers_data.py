"""The papers' figures are those of the papers: sums of a second transcription, and what the papers' own sums say."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava.eval.reports
from benchmarks.all_methods import Sources, published
from llava.eval.reports import by_budget
from llava.eval.reports.published import METHOD_NAMES, PAPERS, load_paper
from llava.reduction.budget import ModelShape
from llava.reduction.config import ReductionConfig

FOLDER = Path(llava.eval.reports.__file__).parent / "papers"
COSTS = ("FLOPs (T)", "GPU hours")

# Taken from a transcription that was made without a look at the data files: figures in a table, and their sum.
TABLES = {
    "prumerge_v1": {"1": (53, 12721.3), "2": (32, 979.84), "3": (28, 9108.66), "4": (12, 4711.3), "5": (12, 4731.0)},
    "prumerge": {
        **{"1": (65, 16360.1), "2": (32, 979.84), "3": (44, 1144.6), "4": (16, 4962.47), "5": (12, 4691.3)},
        **{"6": (12, 4721.0), "7": (42, 12283.9)},
    },
    "trim": {"1": (148, 26275.5)},
    "stf": {"2": (89, 5247.2), "3": (40, 2395.1), "4": (70, 4067.3), "5": (30, 1773.5)},
    "pyramiddrop": {
        **{"1": (54, 13071.66), "2": (40, 3617.1), "3": (32, 7782.26), "4": (80, 16591.68), "5": (60, 11976.01)},
        "Figure 2": (4, 4737.0),
    },
}
# The same by benchmark, so that no two columns can be in each other's place.
BENCHMARKS = {
    "prumerge_v1": {
        **{"VQAv2": 689.6, "ScienceQA-IMG": 1470.07, "TextVQA": 1229.78, "POPE": 1457.7, "MME": 25873.61},
        **{"MMBench": 551.5, "FLOPs (T)": 37.84, "prefill (ms)": 794.3, "memory (GB)": 131.9, "activation (GB)": 15.8},
    },
    "prumerge": {
        **{"VQAv2": 1352.6, "ScienceQA-IMG": 1800.86, "TextVQA": 1596.29, "POPE": 1939.6, "MME": 35220.52},
        **{"MMBench": 1108.9, "FLOPs (T)": 37.84, "prefill (ms)": 794.3, "memory (GB)": 131.9, "activation (GB)": 15.8},
        **{"MSVD-QA": 472.8, "MSVD-QA score": 23.4, "MSRVTT-QA": 361.4, "MSRVTT-QA score": 20.4},
        **{"ActivityNet-QA": 247.8, "ActivityNet-QA score": 18.8},
    },
    "trim": {
        **{"VQAv2": 950.7, "GQA": 595.7, "VizWiz": 455.8, "ScienceQA-IMG": 949.9, "TextVQA": 788.6, "POPE": 1000.8},
        **{"MME": 18415.1, "MMBench": 796.0, "MMBench-CN": 439.7, "SEED-IMG": 546.6, "LLaVA-Bench": 502.2},
        **{"MM-Vet": 250.0, "average": 584.4},
    },
    "stf": {
        **{"FLOPs (T)": 81.0, "GQA": 1412.1, "ScienceQA-IMG": 1521.6, "TextVQA": 1290.2, "POPE": 1965.6},
        **{"MMBench": 1494.5, "MMBench-CN": 1329.2, "VQAv2": 1787.1, "VizWiz": 1105.4, "average": 1496.4},
    },
    "pyramiddrop": {
        **{"GPU hours": 4223, "FLOPs (T)": 253.21, "MME": 36298.7, "MMBench": 937.6, "MMBench-CN": 1188.7},
        **{"SEED-IMG": 954.5, "MMStar": 230.9, "POPE": 1375.8, "average": 1766.8, "DocVQA": 1174.6, "InfoVQA": 349.9},
        **{"TextVQA": 910.4, "ChartQA": 730.7, "OCRVQA": 254.1, "VQAv2": 326.5, "VizWiz": 239.2, "GQA": 1132.0},
        "ScienceQA-IMG": 692.1,
        **{f"sequence length, stage {n} (tokens)": v for n, v in enumerate((2389, 1255, 688, 405), start=1)},
    },
}


def lines(paper: str) -> list[dict[str, str]]:
    with (FOLDER / f"{paper}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows(paper: str) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
    """The rows of the paper's tables: what they have in common, and their figures by benchmark."""
    found: dict[tuple[str, ...], tuple[dict[str, str], dict[str, float]]] = {}
    for line in lines(paper):
        key = tuple(line[name] for name in ("table", "model", "resolution", "method", "tokens", "trained"))
        found.setdefault(key, (line, {}))[1][line["benchmark"]] = float(line["value"])
    return iter(found.values())


@pytest.mark.parametrize("paper", TABLES)
def test_sums_of_a_second_transcription(paper: str) -> None:
    by_table: dict[str, list[float]] = defaultdict(list)
    by_benchmark: dict[str, list[float]] = defaultdict(list)
    for line in lines(paper):
        by_table[line["table"]].append(float(line["value"]))
        by_benchmark[line["benchmark"]].append(float(line["value"]))
    assert {table: (len(values), round(sum(values), 2)) for table, values in by_table.items()} == TABLES[paper]
    assert {name: round(sum(values), 2) for name, values in by_benchmark.items()} == BENCHMARKS[paper]


# TRIM's mean is over PruMerge's six tasks, with MME as a share of 1 (not of 100).
TRIM_TASKS = ("VQAv2", "ScienceQA-IMG", "TextVQA", "POPE", "MME", "MMBench")


@pytest.mark.parametrize(
    ("paper", "averages"), [("trim", 10), ("stf", 23), ("pyramiddrop", 28), ("tokenpacker", 16), ("eadp", 19)]
)
def test_printed_averages_follow_from_the_row(paper: str, averages: int) -> None:
    mme_points = 2000 if paper == "trim" else 20
    checked = 0
    for line, figures in rows(paper):
        if "average" not in figures:
            continue
        tasks = TRIM_TASKS if paper == "trim" else [name for name in figures if name not in (*COSTS, "average")]
        mean = sum(figures[name] / (mme_points if name == "MME" else 1) for name in tasks) / len(tasks)
        # STF prints 65.4 for 65.46.
        tolerance = 0.07 if line["method"] == "TokenConcat" else 0.0501
        assert figures["average"] == pytest.approx(mean, abs=tolerance), (line["table"], line["model"], line["method"])
        checked += 1
    assert checked == averages


# Papers whose average is the mean share of the full model's scores: rows with one, and those that do not follow, by
# more than rounding may do where the papers averaged what they had not rounded yet.
SHARES = {
    **{"restore": (25, set()), "v2drop": (21, set()), "vscan": (19, set()), "dart": (6, set())},
    "autoprune": (7, set()),
    "mmtok": (19, {("SparseVLM", "128"), ("SparseVLM", "64"), ("VisionZip", "64")}),
    "sparsevlm": (13, {("PyramidDrop", "128")}),
    "cen_prune": (13, {("MMTok", "64")}),
    "holov": (
        19,
        {
            *(("PyramidDrop", "192"), ("VisionZip", "192"), ("VisionZip", "128"), ("DART", "128"), ("HoloV", "128")),
            *(("PruMerge", "64"), ("DART", "64"), ("HoloV", "64")),
        },
    ),
}


@pytest.mark.parametrize("paper", SHARES)
def test_printed_averages_are_the_mean_share_of_the_full_model(paper: str) -> None:
    """A slip in any figure of a row would show, within the rounding of the average."""
    table = list(rows(paper))
    full = next(figures for line, figures in table if line["method"] == "none")
    checked, differing = 0, set()
    for line, figures in table:
        if "average" not in figures:
            continue
        shares = [value / full[name] for name, value in figures.items() if name not in (*COSTS, "average")]
        distance = abs(figures["average"] - 100 * sum(shares) / len(shares))
        assert distance < (0.62 if line["method"] == "VisionZip" and paper == "holov" else 0.17), line
        checked += 1
        if distance > (0.0501 if paper in ("restore", "v2drop") else 0.0601):
            differing.add((line["method"], line["tokens"]))
    assert (checked, differing) == SHARES[paper]


def test_published_figures_beside_the_benchmark_say_what_they_are() -> None:
    """By origin, with the number of the source."""
    sources = Sources()
    own, again, copied = published("tome", 64, sources)
    assert own == "" and again.startswith("91.6 [") and "69.7 [" in copied
    numbers = [int(number) for number in re.findall(r"\[(\d+)\]", f"{again} {copied}")]
    assert sorted(numbers) == list(range(1, len(sources.names) + 1))
    assert "‡" in published("visionzip", 64, sources)[2]
    assert published("tome", 100, sources) == published("none", 64, sources) == ["", "", ""]


VISUAL_TOKENS = {"336": 576, "5 patches": 5 * 576, "9 patches": 9 * 576}


def printed_cost(method: str, tokens: int) -> float:
    """TFLOPs of the image tokens in a 7B model of 32 layers, by PyramidDrop's equation 4."""
    width, inner = 4096, 11008
    if method.startswith("FastV"):  # half of the tokens are left after the second layer
        layers = [(2, tokens), (30, tokens / 2)]
    else:
        share = 1.0 if method == "none" else float((re.findall(r"lambda ([\d.]+)", method) or [0.5])[0])
        layers = [(8, tokens * share**stage) for stage in range(4)]
    return sum(k * (4 * n * width**2 + 2 * n**2 * width + 3 * n * width * inner) for k, n in layers) / 1e12


def test_pyramiddrops_flops_follow_from_its_equation() -> None:
    checked = 0
    for line, figures in rows("pyramiddrop"):
        if "FLOPs (T)" not in figures:
            continue
        expected = printed_cost(line["method"], VISUAL_TOKENS[line["resolution"]])
        assert figures["FLOPs (T)"] == pytest.approx(expected, rel=0.005), (line["table"], line["method"])
        checked += 1
    assert checked == 24


def test_a_figure_is_the_same_in_every_paper_that_copied_it() -> None:
    own = {
        (line["model"], line["method"], line["benchmark"]): line for line in lines("prumerge") if line["table"] == "1"
    }
    llava: dict[tuple[str, str], set[float]] = defaultdict(set)
    copied = 0
    for paper in TABLES:
        for line in lines(paper):
            if line["copied_from"] == "PruMerge (arXiv 2403.15388)":
                source = own[line["model"], line["method"], line["benchmark"]]
                assert float(line["value"]) == float(source["value"]), (paper, line)
                copied += 1
            if line["copied_from"] == "LLaVA-1.5 (arXiv 2310.03744)":
                llava[line["model"], line["benchmark"]].add(float(line["value"]))
    assert copied == 4 * 6 + 5
    # Printed as 41.0 in PruMerge's two versions, as 65.0 by TRIM.
    assert llava.pop(("BLIP-2", "VQAv2")) == {41.0, 65.0}
    assert {key: values for key, values in llava.items() if len(values) > 1} == {}


def test_handed_on_figures_are_the_same_in_every_paper() -> None:
    printed: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for paper in ("sparsevlm", "dart", "v2drop", "mmtok", "vscan", "holov"):
        for line in lines(paper):
            is_source = (paper, line["method"]) in {("sparsevlm", "ToMe"), ("dart", "DART")}
            if line["benchmark"] != "average" and line["tokens"] != "576" and (is_source or line["copied_from"]):
                printed[line["method"], line["tokens"], line["benchmark"]][paper] = line["value"]
    several = {key: set(by_paper.values()) for key, by_paper in printed.items() if len(by_paper) > 1}
    assert len(several) == 132
    assert {key: values for key, values in several.items() if len(values) > 1} == {
        ("PyramidDrop", "128", "TextVQA"): {"54.8", "55.1"},  # V2Drop; HoloV
        ("PruMerge", "64", "MMBench"): {"55.2", "55.3"},  # V2Drop; HoloV
        ("VisionZip", "192", "MME-sum"): {"1782.6", "1783"},
        ("VisionZip", "192", "VQAv2"): {"76.8", "77.4"},  # MMTok; VScan
        ("VisionZip", "128", "MME-sum"): {"1761.7", "1763"},
    }


def test_figures_of_visionzip_for_others_are_named_as_copied() -> None:
    sources = {line["method"]: line["copied_from"] for line in lines("mmtok")}
    assert {name for name, source in sources.items() if not source} == {"DivPrune", "MMTok"}


# Tokens that a layer processes in the mean over 32, of what papers call 192, 128 and 64.
A_LAYER = {
    "sparsevlm": {192: 206.5, 128: 145.4, 64: 82.3},
    "dart": {192: 219.8, 128: 159.8, 64: 99.8},
    "vscan": {64: 64},
    **{name: {192: 192, 128: 128, 64: 64} for name in ("visionzip", "mmtok", "holov")},
    **{"m3": {144: 144, 36: 36, 9: 9, 1: 1, 576: 576}, "tokenpacker": {144: 144, 64: 64, 36: 36}},
    "mqt": {256: 256, 144: 144, 16: 16},
}


@pytest.mark.parametrize("method", sorted(A_LAYER))
def test_a_rows_options_are_those_of_its_label(method: str) -> None:
    found = {}
    for row in by_budget.published(method):
        if row.options is not None:
            assert row.tokens is not None
            found[row.tokens] = ModelShape().mean_tokens(ReductionConfig.parse(row.options).build_all())
    assert found == pytest.approx(A_LAYER[method], abs=0.06)


def test_published_rows_say_whose_they_are() -> None:
    at_64 = by_budget.published("visionzip", 64)
    assert {(row.printed, row.origin, row.trained) for row in at_64} >= {
        ("VisionZip", "re-run", None),
        ("VisionZip", "copied", False),
        ("VisionZip‡", "copied", True),
    }
    assert {row.origin for row in by_budget.published("tome", 64)} == {"re-run", "copied", "not said"}
    own = [row for row in by_budget.published("sparsevlm", 64) if row.origin == "own"]
    assert [(row.scores["POPE"], row.average) for row in own] == [(77.5, 89.3)]
    assert own[0].kept == pytest.approx(89.3, abs=0.05) and own[0].source.endswith("ICML 2025, table 1")
    assert not by_budget.published("tome", 100) and not by_budget.published("random")
    assert by_budget.published("divprune", None)[-1].method == "divprune"
    with pytest.raises(ValueError, match="visionzap"):
        by_budget.published("visionzap", 64)


def test_papers_name_their_own_methods_as_their_tables_do() -> None:
    elsewhere = {
        "RESTORE",
        "Cen-Prune",
        "EADP",
        "FastVLM",
        "AutoPrune",
    }  # in tables of which only the other rows are here
    for paper in map(load_paper, PAPERS):
        printed = {by_budget.base_name(figure.method) for table in paper.tables for figure in table.figures}
        assert paper.own and set(paper.own) - elsewhere <= printed, paper.name
        assert set(paper.options) <= {figure.method for table in paper.tables for figure in table.figures}, paper.name


def test_methods_here_have_the_papers_names() -> None:
    printed = {by_budget.base_name(line["method"]) for paper in PAPERS for line in lines(paper)}
    assert set(METHOD_NAMES.values()) <= printed
