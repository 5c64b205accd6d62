"""`llava report`: the papers' tables as data, intervals, runs beside published figures and among themselves."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from setuptools import Distribution
from typer.testing import CliRunner

from llava import cli
from llava.eval.answering import VqaOptions
from llava.eval.reports import published
from llava.eval.reports.comparison import baselines, compare, differing_settings, relative_score
from llava.eval.reports.findings import measured_findings, published_findings
from llava.eval.reports.intervals import Interval, bootstrap, wilson
from llava.eval.reports.measured import load_runs
from llava.eval.reports.published import COLUMNS, PAPERS, Figure, in_percent, load_paper, read_figures
from llava.eval.reports.report import ReportOptions, report
from llava.eval.running import Evaluation, run_tasks
from llava.eval.sharding import Source
from llava.eval.tasks import TASKS, get_task
from tests.conftest import ROOT
from tests.standins import make
from tests.tiny_llava import save_tiny_llava

NEXT_WITH_PYRAMIDDROP = ("table 1", "LLaVA-NeXT-7B, 5 patches", "PyramidDrop")
COPIED_FROM_LLAVA = "LLaVA-1.5 (arXiv 2310.03744)"


def all_figures(paper: str) -> list[Figure]:
    return [figure for table in load_paper(paper).tables for figure in table.figures]


def printed(paper: str, table: str, model: str, method: str, benchmark: str, **more: object) -> str:
    """The one figure of this place, as it is printed."""
    (found,) = (
        figure.printed
        for figure in load_paper(paper).table(table).figures
        if (figure.model, figure.method, figure.benchmark) == (model, method, benchmark)
        and all(getattr(figure, name) == value for name, value in more.items())
    )
    return found


def pope_grades(wrong: int, questions: int = 60) -> list[dict[str, Any]]:
    """Grades of POPE of which the first ones are wrong, over its three categories."""
    categories = ("random", "popular", "adversarial")
    return [
        {"said": bool(n % 2) != (n < wrong), "true": bool(n % 2), "category": categories[n % 3]}
        for n in range(questions)
    ]


def mean_of(grades: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"accuracy": 100 * fmean(grade["score"] for grade in grades)}


def write_result(folder: Path, task: str, grades: list[dict[str, Any]], group: int = 1, **changes: Any) -> None:
    """A task's folder as `llava eval` writes it; entries of `changes` replace those of the file or of its settings."""
    metrics = get_task("pope").summarize(grades) if task == "pope" else mean_of(grades)
    main, benchmark = ("f1", "POPE") if task == "pope" else ("accuracy", task.upper())
    settings = {
        "conv_mode": "vicuna_v1",
        "temperature": 0,
        "num_beams": 1,
        "max_new_tokens": 16,
        "image_aspect_ratio": "pad",
        "no_images": False,
        "questions_sha256": "0" * 64,
    }
    content = {
        "format": 1,
        "task": task,
        "metrics": metrics,
        "main": main,
        "published": {benchmark: main},
        "questions": len(grades),
        "limit": None,
        "checkpoint": {"model": "LLaVA-1.5-7B", "sha256": "1"},
        "reduction": None,
        "judge": None,
        "visual_tokens": {"before_mean": 576.0, "mean": 576.0},
        "flops_per_question": 9e12,
        **{name: value for name, value in changes.items() if name not in settings},
        "settings": settings | {name: value for name, value in changes.items() if name in settings},
    }
    path = folder / task
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(content))
    rows = ({"question_id": n, "group": n // group if group > 1 else None, "grade": g} for n, g in enumerate(grades))
    (path / "grades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def reduced(method: str, tokens: float) -> dict[str, Any]:
    """What a reduced run's result says."""
    return {
        "reduction": {"encoder": {"name": method}},
        "visual_tokens": {"before_mean": 576.0, "mean": tokens},
        "flops_per_question": 3e12,
    }


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A full model, and TRIM on it; POPE with settings of its own for TRIM."""
    full, trim = tmp_path / "full", tmp_path / "trim"
    write_result(full, "pope", pope_grades(6))
    write_result(full, "gqa", [{"score": n < 60} for n in range(100)])
    write_result(trim, "pope", pope_grades(12), **reduced("trim", 120.0), conv_mode="plain")
    write_result(trim, "gqa", [{"score": n < 54} for n in range(100)], **reduced("trim", 124.0))
    return [full, trim]


def shown(*words: str | Path) -> str:
    """What `llava report` prints."""
    result = CliRunner().invoke(cli.app, ["report", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# The papers as data ----------------------------------------------------------------------------------------------


COUNTS = (223, 137, 148, 229, 270, 225, 147, 130, 76, 53, 190, 190, 178, 30, 112, 12, 56, 156, 190)


@pytest.mark.parametrize(("paper", "count"), list(zip(PAPERS, COUNTS, strict=True)))
def test_every_table_is_there(paper: str, count: int) -> None:
    assert len(all_figures(paper)) == count  # no line goes missing; reading checks each one
    loaded = load_paper(paper)
    assert all(table.title and table.setting and table.figures for table in loaded.tables)
    assert loaded.title and loaded.arxiv and loaded.venue


def test_figures_are_as_printed() -> None:
    assert printed("prumerge", "1", "LLaVA-1.5-7B", "PruMerge", "POPE", tokens=32, trained=True) == "76.3"
    assert printed("prumerge_v1", "1", "LLaVA-1.5-7B", "PruMerge", "POPE", tokens=40) == "86.3"
    assert printed("prumerge", "2", "LLaVA-1.5-13B (INT4)", "PruMerge", "prefill (ms)") == "29.0"
    assert printed("prumerge", "3", "Video-LLaVA-7B", "PruMerge+", "MSRVTT-QA") == "59.3"
    assert printed("prumerge", "4", "LLaVA-1.5-7B", "sequential", "POPE", tokens=35, trained=False) == "11.7"
    assert printed("prumerge", "7", "LLaVA-1.5-7B", "PruMerge+", "MME", tokens=288) == "1507.1"
    assert printed("prumerge_v1", "3", "LLaVA-1.5-7B", "spatial 8x5", "ScienceQA-IMG") == "68.12"
    assert printed("trim", "1", "LLaVA-1.5-13B", "TRIM", "MMBench", tokens=123) == "69.2"
    assert printed("trim", "1", "InstructBLIP-7B", "none", "LLaVA-Bench") == "60.9"
    assert printed("stf", "2", "LLaVA-1.5-7B", "LLaVolta", "ScienceQA-IMG") == "70.5"
    assert printed("stf", "4", "LLaVA-1.5-7B", "STF (k=8, E=32)", "VizWiz", tokens=288) == "39.2"
    assert printed("pyramiddrop", "1", "LLaVA-NeXT-7B", "PyramidDrop", "MMStar", resolution="9 patches") == "40.9"
    assert printed("pyramiddrop", "4", "LLaVA-1.5-7B", "PyramidDrop (lambda 0.6)", "InfoVQA") == "21.0"
    assert printed("pyramiddrop", "5", "LLaVA-NeXT-7B", "FastV", "DocVQA", trained=False) == "62.1"


@pytest.mark.parametrize("name", TASKS)
def test_tasks_and_papers_spell_benchmarks_alike(name: str) -> None:
    assert set(get_task(name).published) <= set(published.BENCHMARKS)


def test_copied_figures_say_from_where() -> None:
    sources = {(f.paper, f.model, f.method, f.benchmark): f.copied_from for p in PAPERS for f in all_figures(p)}
    assert sources["trim", "BLIP-2", "none", "VQAv2"] == COPIED_FROM_LLAVA
    assert sources["trim", "LLaVA-1.5-7B", "PruMerge", "POPE"] == "PruMerge (arXiv 2403.15388)"
    assert sources["trim", "LLaVA-1.5-7B", "PruMerge", "average"] is None
    assert sources["prumerge", "LLaVA-1.5-7B", "CrossGet", "MME"] == "CrossGet (arXiv 2305.17455)"
    assert sources["pyramiddrop", "LLaVA-NeXT-7B", "none", "MME"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,LLaVA,,,TRIM,,,,POPE,abc", "could not convert"),
        ("1,LLaVA,,,TRIM,,,,Pope,80", "unknown benchmark 'Pope'"),
        ("1,LLaVA,,,TRIM,,maybe,,POPE,80", "'trained' is 'maybe'"),
        ("1,LLaVA,,,,,,,POPE,80", "'method' is empty"),
        ("1,LLaVA,,,TRIM,,,POPE,80", "expected 10 entries"),
        ("1,LLaVA,,,TRIM,,,,POPE,80\n1,LLaVA,,,TRIM,,yes,,POPE,81", "the same figure"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "trim.csv"
    file.write_text(",".join(COLUMNS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"trim\.csv, line \d: .*{message}"):
        list(read_figures(file))


def test_installed_packages_have_the_data() -> None:
    project = Distribution()
    project.parse_config_files([str(ROOT / "pyproject.toml")])
    folder = ROOT / "llava/eval/reports"
    packaged = {file.name for pattern in project.package_data["llava.eval.reports"] for file in folder.glob(pattern)}
    assert packaged == {f"{paper}.{suffix}" for paper in PAPERS for suffix in ("csv", "yaml")}


# Intervals -------------------------------------------------------------------------------------------------------


def test_wilson_gives_known_values() -> None:
    interval = wilson(8, 10)
    assert (round(interval.low, 2), round(interval.high, 2)) == (49.02, 94.33)
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(27.75, abs=0.01)
    assert wilson(10, 10).high == 100
    assert wilson(800, 1000).high - wilson(800, 1000).low < 5.1
    with pytest.raises(ValueError, match="11 right of 10"):
        wilson(11, 10)


def test_the_bootstrap_agrees_with_wilson_and_repeats() -> None:
    grades: list[dict[str, Any]] = [{"score": n % 5 != 0} for n in range(1000)]
    found = bootstrap(grades, [None] * 1000, mean_of)["accuracy"]
    exact = wilson(800, 1000)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.4)
    assert bootstrap(grades, [None] * 1000, mean_of)["accuracy"] == found


def test_the_bootstrap_draws_groups_as_a_whole() -> None:
    grades: list[dict[str, Any]] = [{"score": (n // 10) % 2} for n in range(400)]
    alone = bootstrap(grades, [None] * 400, mean_of)["accuracy"]
    grouped = bootstrap(grades, [n // 10 for n in range(400)], mean_of)["accuracy"]
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_a_run_takes_the_interval_that_fits(runs: list[Path], tmp_path: Path) -> None:
    (full,) = load_runs(runs[:1])
    assert full.results["gqa"].interval("accuracy") == wilson(60, 100)
    pope = full.results["pope"]
    f1 = pope.interval("f1")
    assert f1 is not None and f1.low < pope.metric("f1") < f1.high  # type: ignore[operator]
    write_result(tmp_path / "soft", "textvqa", [{"score": 0.3 * (n % 4)} for n in range(100)])
    (run,) = load_runs([tmp_path / "soft"])
    found = run.results["textvqa"].interval("accuracy")
    assert found is not None and found.holds(45) and found != wilson(45, 100)
    (tmp_path / "soft" / "textvqa" / "grades.jsonl").unlink()
    (run,) = load_runs([tmp_path / "soft"])
    assert run.results["textvqa"].interval("accuracy") is None


def test_grades_that_the_task_cannot_read_are_named(runs: list[Path]) -> None:
    file = runs[0] / "pope" / "grades.jsonl"
    file.write_text('{"question_id": 1, "group": null, "grade": {"said": true}}\n')
    with pytest.raises(ValueError, match=r"grades\.jsonl is not what task pope reads \('category'\); evaluate"):
        load_runs(runs)[0].results["pope"].interval("f1")
    file.write_text('{"question_id": 1, "group": null, "grade": 1}\n')
    with pytest.raises(ValueError, match=r"grades\.jsonl, question 1: 'grade' should be an object"):
        load_runs(runs)[0].results["pope"].interval("f1")


# Runs beside figures ---------------------------------------------------------------------------------------------


def test_measured_stands_beside_published(runs: list[Path]) -> None:
    _, trim = load_runs(runs)
    found = {c.benchmark: c for c in compare(trim, all_figures("trim"), model="LLaVA-1.5-7B", method="TRIM")}
    assert found.keys() == {"POPE", "GQA"}
    gqa = found["GQA"]
    assert gqa.figure is not None and gqa.figure.printed == "61.4" and gqa.tables == ("1",)
    assert gqa.difference == pytest.approx(54 - 61.4)
    assert gqa.interval == wilson(54, 100) == Interval(gqa.interval.low, gqa.interval.high)
    assert gqa.within is True  # 61.4 lies below 63.4
    assert found["POPE"].difference == pytest.approx(trim.results["pope"].metric("f1") - 85.3)  # type: ignore[operator]


def test_answers_about_clips_stand_beside_table_3(tmp_path: Path) -> None:
    """Both figures of a benchmark: accuracy and the judge's mean grade."""
    task, folder = get_task("msvd_qa"), tmp_path / "video-7b-prumerge"
    grades = [{"score": float(n < 71), "points": 4} for n in range(100)]
    facts = {"metrics": task.summarize(grades), "published": dict(task.published)}
    checkpoint = {"model": "Video-LLaVA-7B", "sha256": "1"}
    write_result(folder, "msvd_qa", grades, group=10, checkpoint=checkpoint, **facts, **reduced("prumerge", 256.0))
    rows = rows_of(shown("--paper", "prumerge", folder, "--format", "csv"))
    found = {row["benchmark"]: (row["measured"], row["published"]) for row in rows}
    assert found == {"MSVD-QA": ("71.00", "71.1"), "MSVD-QA score": ("4.00", "3.9")}


def test_a_figure_that_several_tables_print_stands_once(runs: list[Path]) -> None:
    full = load_runs(runs)[0]
    (pope,) = compare(full, all_figures("prumerge"), model="LLaVA-1.5-7B", method="none")
    assert pope.tables == ("1", "5", "6", "7")


def test_the_table_marks_what_is_copied_and_how_many_questions(runs: list[Path]) -> None:
    rows = rows_of(shown("--paper", "trim", *runs, "--format", "csv"))
    gqa = next(row for row in rows if (row["benchmark"], row["run"]) == ("GQA", "trim"))
    assert (gqa["published"], gqa["measured"], gqa["difference"], gqa["within"]) == ("61.4", "54.00", "-7.40", "yes")
    assert (gqa["questions"], gqa["tokens"], gqa["published tokens"], gqa["copied from"]) == ("100", "124.0", "123", "")
    full = next(row for row in rows if (row["benchmark"], row["run"]) == ("GQA", "full"))
    assert full["copied from"] == COPIED_FROM_LLAVA
    text = shown("--paper", "trim", *runs)
    assert "62.0*" in text and f"* copied from: {COPIED_FROM_LLAVA}" in text


def test_another_method_and_model_can_be_named(runs: list[Path], tmp_path: Path) -> None:
    words = ("--paper", "trim", *runs, "--format", "csv", "--model", "LLaVA-1.5-13B", "--method", "TRIM (top 5%)")
    values = {row["run"]: row["published"] for row in rows_of(shown(*words)) if row["benchmark"] == "GQA"}
    assert values == {"full": "63.3", "trim": "56.0"}
    write_result(tmp_path / "other", "gqa", [{"score": 1}] * 9, **reduced("trim", 29.0))
    words = ("--paper", "trim", runs[1], tmp_path / "other", "--format", "csv", "--method", "other=TRIM (top 5%)")
    shown_rows = [row for row in rows_of(shown(*words)) if row["benchmark"] == "GQA"]
    assert {row["run"]: row["published"] for row in shown_rows} == {"trim": "61.4", "other": "58.4"}
    write_result(tmp_path / "toy", "gqa", [{"score": 1}] * 9, checkpoint={"model": None})
    text = shown("--paper", "trim", tmp_path / "toy")
    assert "do not say which model of the papers this is; --model names it" in text


def test_what_differs_from_the_papers_is_said(tmp_path: Path) -> None:
    grades = [{"score": 1}] * 9
    write_result(tmp_path / "run", "gqa", grades, limit=9, no_images=True, temperature=0.2, judge={"model": "judge-1"})
    text = shown("--paper", "trim", tmp_path / "run")
    for sentence in (
        "run/gqa: only 9 questions were asked",
        "run/gqa: the images were left out",
        "run/gqa: answers were sampled",
        "run/gqa: the judge was judge-1",
    ):
        assert sentence in text


# Runs among themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv_mode": "plain"}, 'conv_mode: "vicuna_v1" (a); "plain" (b)'),
        ({"num_beams": 5}, "num_beams: 1 (a); 5 (b)"),
        ({"max_new_tokens": 64}, "max_new_tokens: 16 (a); 64 (b)"),
        ({"image_aspect_ratio": "anyres"}, 'image_aspect_ratio: "pad" (a); "anyres" (b)'),
        ({"no_images": True}, "no_images: false (a); true (b)"),
        ({"questions_sha256": "f" * 64}, 'the questions (questions_sha256): "000000000..." (a); "fffffffff..." (b)'),
        ({"limit": 9}, "limit: null (a); 9 (b)"),
        ({"judge": {"model": "judge-1"}}, 'judge: null (a); "judge-1" (b)'),
    ],
)
@pytest.mark.parametrize("form", ["table", "csv", "markdown"])
def test_a_setting_that_runs_do_not_share_is_said(
    tmp_path: Path, changes: Mapping[str, Any], words: str, form: str
) -> None:
    grades = [{"score": 1}] * 9
    write_result(tmp_path / "a", "gqa", grades)
    write_result(tmp_path / "b", "gqa", grades, **changes)
    assert differing_settings(load_runs([tmp_path / "a", tmp_path / "b"])) == {"gqa": [f"the runs differ in {words}"]}
    text = shown(tmp_path / "a", tmp_path / "b", "--format", form)
    assert words in text.replace('""', '"').replace("\\*", "*")


def test_equal_settings_are_not_noted(runs: list[Path]) -> None:
    notes = differing_settings(load_runs(runs))
    assert notes.keys() == {"pope"}


def test_relative_performance_and_means(runs: list[Path]) -> None:
    full, trim = load_runs(runs)
    rows = {(row["task"], row["run"]): row for row in rows_of(shown(*runs, "--format", "csv"))}
    assert rows["gqa", "trim"]["relative, %"] == "90.0"
    assert (rows["gqa", "trim"]["95 % low"], rows["gqa", "trim"]["questions"]) == ("44.3", "100")
    assert rows["gqa", "trim"]["tokens, % of all"] == "21.5" and rows["gqa", "trim"]["TFLOPs"] == "3"
    mean = rows["mean over 2", "trim"]
    pope = trim.results["pope"].metric("f1")
    assert pope is not None and float(mean["score"]) == pytest.approx((54 + pope) / 2, abs=0.01)
    assert mean["tokens"] == "122.0" and "plain" in mean["note"]
    assert relative_score(trim, full, ["gqa"]) == pytest.approx(90)


def test_the_baseline_is_the_full_model_of_the_same_name_or_the_chosen_run(runs: list[Path], tmp_path: Path) -> None:
    write_result(tmp_path / "other", "gqa", [{"score": 1}] * 9, checkpoint={"model": "LLaVA-1.5-13B"})
    loaded = load_runs([*runs, tmp_path / "other"])
    assert {name: run.name for name, run in baselines(loaded).items()} == {
        **{"full": "full", "trim": "full", "other": "other"},
    }
    assert {run.name for run in baselines(loaded, "trim").values()} == {"trim"}
    with pytest.raises(ValueError, match=r"--baseline x: no such run here; the runs are: full, trim, other"):
        baselines(loaded, "x")
    write_result(tmp_path / "second", "gqa", [{"score": 1}] * 9)
    text = shown(*runs, tmp_path / "second")
    assert "no run without reduction to compare with for full, trim, second; --baseline names one" in text


def test_mme_counts_as_a_share_of_its_points() -> None:
    assert in_percent("MME", 1500) == 75 and in_percent("MME-sum", 1400) == 50 and in_percent("POPE", 86) == 86


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"format": 2}, "format 1"),
        ({"metrics": None}, "'metrics' is missing or of another type"),
        ({"checkpoint": {"model": "LLaVA-1.5-13B", "sha256": "2"}}, "differ in their checkpoint"),
        ({"reduction": {"encoder": {"name": "trim"}}}, "differ in their reduction"),
    ],
)
def test_a_bad_result_is_named(runs: list[Path], spoil: Mapping[str, Any], message: str) -> None:
    file = runs[0] / "gqa" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **spoil}))
    with pytest.raises(ValueError, match=message):
        load_runs(runs)


def test_folders_that_are_no_runs_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no result"):
        load_runs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="name the folder above it"):
        load_runs([runs[0] / "pope"])
    with pytest.raises(ValueError, match="named twice"):
        load_runs([runs[0], runs[0]])


def test_what_llava_eval_wrote_is_read(tmp_path: Path) -> None:
    checkpoint = save_tiny_llava(tmp_path / "llava-tiny")
    make("textvqa", tmp_path / "data")
    options = VqaOptions(temperature=0.0, count_visual_tokens=True)
    for name in ("none", "prumerge"):
        source = Source(model_path=str(checkpoint), reduction=name)
        run_tasks(
            Evaluation(
                source=source,
                tasks=["textvqa"],
                output=tmp_path / name,
                data=tmp_path / "data",
                options=options,
                max_new_tokens=2,
            )
        )
    runs = [tmp_path / "none", tmp_path / "prumerge"]
    full, reduced_run = load_runs(runs)
    assert (full.method, reduced_run.method) == ("none", "PruMerge")
    assert differing_settings([full, reduced_run]) == {}
    assert reduced_run.results["textvqa"].interval("accuracy") is not None
    rows = rows_of(shown("--paper", "prumerge", *runs, "--model", "LLaVA-1.5-7B", "--format", "csv"))
    assert {(row["run"], row["published"]) for row in rows} == {
        ("none", "58.2"),
        ("prumerge", "56.0"),
        ("prumerge", "54.00"),
    }
    shown(*runs, "--plot", tmp_path / "runs.svg")
    assert "visual tokens of an image" in (tmp_path / "runs.svg").read_text()


# Findings --------------------------------------------------------------------------------------------------------


def test_the_papers_claims_follow_from_their_tables() -> None:
    found = {
        (f.source, f.model, f.method, f.quantity): f.value
        for paper in ("prumerge", "pyramiddrop")
        for f in published_findings(load_paper(paper).tables)
    }
    share = "visual tokens, % of all"
    assert found["table 1", "LLaVA-1.5-7B", "PruMerge", share] == pytest.approx(5.5, abs=0.1)
    assert found["table 1", "LLaVA-1.5-7B", "PruMerge+", share] == 25
    assert found["table 4", "LLaVA-1.5-7B", "PruMerge", "visual tokens, ScienceQA-IMG"] == 16
    trained = {quantity: value for (*row, quantity), value in found.items() if row == [*NEXT_WITH_PYRAMIDDROP]}
    assert trained["GPU hours, % of the full model's"] == pytest.approx(60, abs=0.5)  # "40 % training time"
    assert trained["FLOPs (T), % of the full model's"] == pytest.approx(45, abs=0.5)  # "55 % inference FLOPs"
    assert trained["mean over 6 tasks"] == pytest.approx(trained["mean as printed"], abs=0.06)


def test_findings_of_runs(runs: list[Path]) -> None:
    loaded = load_runs(runs)
    found = {(f.source, f.quantity): f.value for f in measured_findings(loaded, baselines(loaded))}
    assert found["trim", "visual tokens, gqa"] == 124 and found["trim", "visual tokens"] == 122
    assert found["trim", "visual tokens, % of all"] == pytest.approx(100 * 122 / 576)
    assert found["full", "relative performance, %"] == 100 > found["trim", "relative performance, %"]
    assert "mean over 2 tasks" in {quantity for _, quantity in found}
    text = shown(*runs, "--findings", "--paper", "trim", "--format", "markdown")
    assert "| trim | LLaVA-1.5-7B | TRIM | visual tokens | 122.0 |" in text and "| table 1 |" in text
    assert 'pope: the runs differ in conv_mode: "vicuna_v1" (full); "plain" (trim)' in text


# The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_is_shown(paper: str) -> None:
    text = shown("--paper", paper, "--format", "csv")
    assert text.splitlines()[0] == "paper,table,model,method,tokens,benchmark,value"
    assert len(text.splitlines()) == 1 + len(all_figures(paper))
    assert all(row["paper"] == paper and float(row["value"]) >= 0 for row in rows_of(text))
    tables = shown("--paper", paper)
    for figure in all_figures(paper):
        assert f"{figure.printed}{'*' if figure.copied_from else ''} " in tables, figure
    assert shown("--paper", paper, "--format", "markdown").count("### ") == len(load_paper(paper).tables)


def test_one_table_is_shown() -> None:
    rows = rows_of(shown("--paper", "prumerge", "--table", "7", "--format", "csv"))
    assert {row["table"] for row in rows} == {"7"} and len(rows) == 42
    assert rows[-1] == {
        **{"paper": "prumerge", "table": "7", "model": "LLaVA-1.5-7B", "method": "PruMerge+"},
        **{"tokens": "288", "benchmark": "MMBench", "value": "64.9"},
    }


def test_the_report_and_the_plot_go_into_files(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "out" / "report.md", tmp_path / "out" / "runs.png"
    assert shown(*runs, "--output", output, "--plot", picture) == ""
    assert output.read_text().startswith("### runs\n\n| task | run |")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.md", "runs.png"]


def test_a_plot_without_matplotlib_names_the_extra(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"the extra 'plots' has: pip install llava\[plots\]"):
        report(runs, ReportOptions(plot=runs[0] / "x.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to report"),
        (["--paper", "llava"], "no paper 'llava'; known: prumerge"),
        (["--paper", "trim", "--table", "2"], "has no table '2' with results; it has: 1"),
        (["--paper", "trim", "--format", "pdf"], "--format pdf: choose table, csv, markdown"),
        (["--table", "1"], "--paper is missing"),
        (["--paper", "trim", "--plot", "x.png"], "are about runs"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["report", *words], catch_exceptions=False)


def test_tables_and_descriptions_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trim.csv").write_text(",".join(COLUMNS) + "\n1,LLaVA,,,TRIM,,,,POPE,80\n")
    (tmp_path / "trim.yaml").write_text("title: x\narxiv: '1'\nvenue: x\ntables:\n  '2': {}\n")
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"describes the tables \['2'\], the CSV has \['1'\]"):
        load_paper.__wrapped__("trim")


@pytest.mark.parametrize("name", ["nothing=TRIM", "TRIMM", "none-there"])
def test_a_method_that_the_paper_does_not_name_is_refused(runs: list[Path], name: str) -> None:
    with pytest.raises(ValueError, match=rf"--method {name}: .*RUN=METHOD.*PruMerge, PruMerge\+, TRIM"):
        report(runs, ReportOptions(paper="trim", model="LLaVA-1.5-7B", method=[name]))
