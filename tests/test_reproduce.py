"""scripts/reproduce: every command of every paper resolves, and a whole chain runs on stand-ins of all its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from llava.cost.presets import CLIP, LANGUAGEBIND
from llava.eval.reports.measured import METHOD_NAMES
from llava.eval.reports.published import load_paper
from llava.eval.tasks import TASKS
from llava.eval.tasks.choices import mmbench
from llava.reproduce.downloads import QUESTIONS
from llava.reproduce.plan import Plan
from llava.reproduce.steps import Step, parse_command, resolve
from tests.conftest import ROOT
from tests.standins import make
from tests.tiny_world import make_tiny_world, run_command

SCRIPTS = ROOT / "scripts" / "reproduce"
PAPERS = ("prumerge", "trim", "stf", "pyramiddrop")


def start(paper: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A paper's script, whose `python` writes the list of steps to `folder`/steps in place of running them."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    (binaries / "python").write_text(f'#!/bin/sh\ncat > "{folder}/steps"\necho "$@" $HF_HUB_OFFLINE\n')
    (binaries / "python").chmod(0o755)
    environment = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": "x", **variables}
    command = ["bash", str(SCRIPTS / f"{paper}.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def plan_of(paper: str, folder: Path, *only: str, **variables: str) -> Plan:
    result = start(paper, folder, **variables)
    assert result.returncode == 0, result.stderr
    kinds = {"only": only} if only else {}
    return Plan.read((folder / "steps").read_text().splitlines(), folder / "done", "A100", **kinds)


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Step]]:
    """All steps of a paper."""
    return cache(lambda paper: plan_of(paper, tmp_path_factory.mktemp(paper), ROWS="all").steps)


def shown(plan: Plan) -> str:
    lines: list[str] = []
    plan.show(lines.append, "A100")
    return "\n".join(lines)


def test_every_paper_with_a_method_here_has_a_script() -> None:
    assert {file.stem for file in SCRIPTS.glob("*.sh")} == {*PAPERS, "common"}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_command_of_every_row_resolves(paper: str, all_rows: Callable[[str], list[Step]]) -> None:
    """As the parsers of `llava train`, `llava eval` and `llava report` read it: settings, methods, tasks, papers."""
    steps = all_rows(paper)
    assert len({step.name for step in steps}) == len(steps)
    training = [step for step in steps if step.kind in ("pretrain", "finetune")]
    asking = [step for step in steps if step.kind == "eval"]
    assert training and all(1 < step.hours < 1000 and step.disk > 0.03 for step in training)
    assert asking and all(step.hours > 0 for step in asking)
    # What an evaluation opens is on the hub, or a training before it makes it.
    outputs = {str(step.makes.parent) for step in training}
    for step in asking:
        opened = parse_command(step.words)[1]["model_path"]
        assert opened in outputs or opened.startswith(("liuhaotian/", "LanguageBind/")), step.command
        towers = {LANGUAGEBIND, f"{LANGUAGEBIND.removesuffix('Image')}Video_merge"}
        assert towers <= step.reads.keys() if step.row.startswith("video") else CLIP in step.reads
    assert {str(step.makes.parent.parent) for step in asking} == {*reported(steps)}


def reported(steps: Sequence[Step]) -> list[str]:
    (report,) = (step for step in steps if step.name == "report-paper")
    return [str(run) for run in parse_command(report.words)[1]["runs"]]


@pytest.mark.parametrize("paper", PAPERS)
def test_the_rows_are_the_papers(paper: str, all_rows: Callable[[str], list[Step]]) -> None:
    """Names of methods stand in its tables, and its benchmarks are asked."""
    steps = all_rows(paper)
    (report,) = (step for step in steps if step.name == "report-paper")
    figures = [figure for table in load_paper(paper).tables for figure in table.figures]
    for name in parse_command(report.words)[1]["method"] or ():
        assert name.partition("=")[2] in {figure.method for figure in figures}
    asked = {
        name
        for step in steps
        if step.kind == "eval"
        for task in parse_command(step.words)[1]["task"].split(",")
        for name in (*TASKS[task].published, TASKS[task].title)
    }
    main = {figure.benchmark for table in load_paper(paper).tables if table.kind == "main" for figure in table.figures}
    scores = {figure.benchmark for figure in figures if figure.is_score}
    assert main & scores <= asked


def test_table_3_is_asked_of_video_llava(all_rows: Callable[[str], list[Step]]) -> None:
    """As many tokens as the paper names, and all that its judge and its questions need."""
    steps = {step.row: step for step in all_rows("prumerge") if step.row.startswith("video")}
    table = load_paper("prumerge").table("3")
    published = {figure.method: figure.tokens for figure in table.figures if figure.model == "Video-LLaVA-7B"}
    methods = {"video-7b-prumerge": "PruMerge", "video-7b-prumerge_plus": "PruMerge+"}
    assert steps.keys() == {"video-7b", *methods}
    for row, method in methods.items():
        option = json.loads(parse_command(steps[row].words)[1]["reduction"])
        assert METHOD_NAMES[option["name"]] == method and 8 * 256 * option["ratio"] == published[method]
        assert steps[row].hours < steps["video-7b"].hours
    asked = parse_command(steps["video-7b"].words)[1]["task"].split(",")
    figures = {figure.benchmark for figure in table.figures}
    assert figures == {name for task in asked for name in TASKS[task].published}
    assert "playground/data/eval/GPT_Zero_Shot_QA/eval_video_qa.py" in steps["video-7b"].reads


def test_the_main_rows_are_the_default(tmp_path: Path, all_rows: Callable[[str], list[Step]]) -> None:
    main = {step.row for step in plan_of("stf", tmp_path).steps if step.kind == "eval"}
    assert main == {"7b", "stf", "avgpool"} < {step.row for step in all_rows("stf")}
    rows = [step.name for step in plan_of("trim", tmp_path, ROWS="7b-trim", ONLY="eval", TASKS="pope").steps]
    assert rows[:2] == ["finetune-7b-trim", "eval-7b-trim"]  # ONLY is the program's to read: it knows what makes what


def test_what_the_program_is_told(tmp_path: Path) -> None:
    words = "-m llava.reproduce --marks outputs/reproduce/trim/done --device {} --only {} 1"
    assert start("trim", tmp_path).stdout.strip() == words.format("A100", "pretrain,finetune,eval,report")
    told = start("trim", tmp_path, DRY_RUN="1", GPU="H100", ONLY="eval", ROWS="7b").stdout.strip()
    assert told == words.format("H100", "eval --dry-run")


def test_what_a_task_lacks_is_named_before_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("mmbench", tmp_path / "data" / "eval")
    words = ["llava", "eval", str(tmp_path), "--task", "mmbench", "--output", str(tmp_path / "out")]
    step = resolve("eval", "x", [*words, "--data", str(tmp_path / "data" / "eval")], {}, "A100")
    Plan([step], tmp_path / "done").check()
    monkeypatch.setattr(mmbench, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="task mmbench: its server reads Excel"):
        Plan([step], tmp_path / "done").check()


def test_a_dry_run_says_what_is_needed(tmp_path: Path) -> None:
    text = shown(plan_of("prumerge", tmp_path, ROWS="7b-prumerge"))
    assert "# finetune, 7b-prumerge: " in text and "GPU hours (A100)" in text
    assert "missing  lmsys/vicuna-7b-v1.5  (13.5 GB; https://huggingface.co/lmsys/vicuna-7b-v1.5)" in text
    assert "missing  playground/data/coco/train2017  (18 GB; http://images.cocodataset.org" in text
    assert "mm_projector.bin  (0.04 GB; https://huggingface.co/liuhaotian/llava-v1.5-mlp2x-336px-pretrain" in text
    assert "# In all: 4 of 4 steps to do; " in text


def test_pretraining_takes_the_place_of_the_projectors_download(tmp_path: Path) -> None:
    steps = plan_of("prumerge", tmp_path, ROWS="7b-prumerge 7b-prumerge_plus", PRETRAIN="1").steps
    first, second, *_ = steps
    assert [step.kind for step in steps].count("pretrain") == 1 and first.kind == "pretrain"
    assert str(first.makes) in second.reads


def test_what_is_missing_is_named_before_anything_starts(tmp_path: Path) -> None:
    plan = plan_of("trim", tmp_path, ROWS="7b-trim", TASKS="pope", OUTPUT=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"nothing was started(.|\n)*llava_v1_5_mix665k.json  \(https://huggingface"):
        plan.run(lambda line: None)
    plan = plan_of("trim", tmp_path, "eval", ROWS="7b-trim", TASKS="pope", OUTPUT=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"checkpoints/7b-trim  \(the step finetune of row 7b-trim makes it\)"):
        plan.run(lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ROWS": "7b,7c"}, "ROWS=7b,7c: no 7c; choose from 7b "),
        ({"ONLY": "evals"}, "ONLY=evals: no evals; choose from pretrain finetune eval report"),
        ({"PRETRAIN": "yes"}, "PRETRAIN=yes: choose 1 or 0"),
        ({"NUM_GPUS": "0"}, "NUM_GPUS=0: expected a whole number from 1"),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    result = start("trim", tmp_path, **variables)
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TASKS": "pop"}, "no task 'pop' .did you mean pope"),
        ({"EVAL_ARGS": "--limits 3"}, "No such option: --limits"),
        ({"EVAL_ARGS": "--limit few"}, "Invalid value for '--limit'"),
        ({"TRAIN_ARGS": "learning_rates=1"}, "unknown key: 'learning_rates'"),
        ({"TRAIN_ARGS": "learning_rate=fast"}, "learning_rate"),
    ],
)
def test_wrong_words_of_commands_are_named(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("trim", tmp_path, ROWS="7b-trim", **variables)
    with pytest.raises(ValueError, match="expected a command of llava"):
        resolve("eval", "x", ["rm", "-r", "x"], {}, "A100")


def test_a_step_is_done_again_after_what_it_reads(tmp_path: Path) -> None:
    def step(kind: str, reads: str, made: str) -> Step:
        return Step(kind=kind, row="x", words=["llava", kind], reads={reads: None}, makes=tmp_path / made)

    steps = [step("pretrain", "data", "a/bin"), step("finetune", str(tmp_path / "a"), "b"), step("report", "r", "c")]
    marks = tmp_path / "done"
    marks.mkdir()
    (tmp_path / "a").mkdir()
    for each in steps:
        each.makes.write_text("")
        (marks / each.name).write_text(each.command)
    assert Plan(steps, marks).todo() == []
    (marks / "pretrain-x").write_text("llava pretrain --other")
    assert Plan(steps, marks).todo() == steps[:2]
    (marks / "pretrain-x").write_text(steps[0].command)
    (tmp_path / "c").unlink()
    assert Plan(steps, marks).todo() == steps[2:]


def test_a_run_that_fails_goes_on_where_it_ended(tmp_path: Path) -> None:
    first, second, marks = tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "done"
    one = Step(kind="pretrain", row="x", words=["cp", __file__, str(first)], reads={__file__: None}, makes=first)
    copy = ["cp", str(first), str(second)]
    two = Step(kind="finetune", row="x", words=copy, reads={str(first): None}, makes=second)
    first.parent.mkdir()
    lines: list[str] = []
    assert Plan([one, two], marks).run(lines.append) == 1  # the folder b is missing
    assert lines[-1] == "finetune-x ended with exit code 1; the same command goes on from here"
    assert [step.name for step in Plan([one, two], marks).todo()] == ["finetune-x"]
    second.parent.mkdir()
    assert Plan([one, two], marks).run(lines.append) == 0 and Plan([one, two], marks).todo() == []
    # The first is made anew, and the second ends early: its old result counts no more.
    (marks / one.name).unlink()
    assert Plan([one, replace(two, words=["false"])], marks).run(lines.append) == 1
    assert second.exists()
    assert [step.name for step in Plan([one, two], marks).todo()] == ["finetune-x"]


def test_every_tasks_number_of_questions_is_known() -> None:
    assert set(QUESTIONS) == set(TASKS)


@pytest.mark.slow
def test_a_whole_chain_on_stand_ins(tmp_path: Path) -> None:
    """Pretrain, finetune with LoRA, evaluate on all of PruMerge's tasks, report; started again, nothing is left."""
    world, tasks = make_tiny_world(tmp_path / "world"), "vqav2,scienceqa,textvqa,pope,mme,mmbench"
    for name in tasks.split(","):
        make(name, tmp_path / "data" / "eval")
    small = "max_steps=2 per_device_train_batch_size=2 global_batch_size=null model_max_length=512 lora_r=4"
    on_cpu = "deepspeed=null bf16=false tf32=false gradient_checkpointing=false dataloader_num_workers=0"
    variables = {
        "ROWS": "7b-prumerge",
        "PRETRAIN": "1",
        "VICUNA_7B": str(world.llm),
        "VISION_TOWER": str(world.clip),
        "PRETRAIN_DATA": str(world.captions),
        "PRETRAIN_IMAGES": str(world.images),
        "FINETUNE_DATA": str(world.data),
        "FINETUNE_IMAGES": str(world.images),
        "DATA": str(tmp_path / "data"),
        "OUTPUT": str(tmp_path / "out"),
        "TRAIN_ARGS": f"{small} {on_cpu}",
        "EVAL_ARGS": "--max-new-tokens 4",
        "REPORT_ARGS": "--model LLaVA-1.5-7B",
        "VIRTUAL_ENV": sys.prefix,
    }
    command = ["bash", str(SCRIPTS / "prumerge.sh")]
    result = run_command(command, **variables)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    for name in tasks.split(","):
        content = json.loads((tmp_path / "out" / "eval" / "7b-prumerge" / name / "result.json").read_text())
        assert content["reduction"]["encoder"]["name"] == "prumerge" and content["flops_per_question"] > 0
    text = (tmp_path / "out" / "report.md").read_text()
    for benchmark, figure in (("ScienceQA-IMG", "68.5"), ("TextVQA", "56.0"), ("MMBench", "60.9")):
        assert f"| {benchmark} | 7b-prumerge | PruMerge | 1 | LLaVA-1.5-7B | yes | 32 | {figure} |" in text
    again = run_command(command, **variables)
    assert (again.returncode, again.stdout.strip()) == (0, "all steps are done"), again.stderr
