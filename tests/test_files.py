"""What is written and what is left alone: other people's files, the places that are read, folders in use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
from transformers import Trainer
from typer.testing import CliRunner

from llava import cli
from llava.eval import model_vqa
from llava.files import (
    CHECKPOINT_FILES,
    LIST_FILE,
    atomic_folder,
    check_apart,
    check_writable,
    checkpoint_folder,
    foreign_files,
    new_folder,
    read_file_list,
    write_file_list,
)
from llava.lock import lock
from llava.train.checkpoints import output_dir
from llava.train.checkpoints.folders import make_room, remove_old_checkpoints
from llava.train.checkpoints.output_dir import LOCK_FILE
from llava.train.checkpoints.saving import extract_projector
from llava.train.preflight.doctor import examine
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.tiny_world import TinyWorld, make_tiny_world

LORA = {"lora_enable": True, "lora_r": 2, "max_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(world: TinyWorld, folder: Path, **settings: Any) -> None:
    train(parse_args(world.flags(folder, **settings)))


# Folders that are written as a whole -----------------------------------------------------------------------------


def write(target: Path, overwrite: bool = False, **files: str) -> None:
    """A checkpoint of this program."""
    with new_folder(target, overwrite=overwrite) as folder:
        for name, text in {"config": "{}", **files}.items():
            (folder / f"{name}.json").write_text(text)


def test_only_what_this_program_wrote_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target)
    with pytest.raises(ValueError, match=r"exists and is not empty.*--overwrite"):
        write(target)
    (target / "notes.txt").write_text("mine")
    (target / "more" / "deep").mkdir(parents=True)
    (target / "more" / "deep" / "notes.txt").write_text("mine too")
    write(target, overwrite=True, tokenizer="[]")
    assert set(contents(target)) == {"config.json", "tokenizer.json", LIST_FILE, "notes.txt", "more/deep/notes.txt"}
    (target / "config.json").write_text('{"changed": "by me"}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"never replaced: config\.json was not written by this program, or was"):
        write(target, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), "it has no files.json"),
        (lambda folder: (folder / LIST_FILE).write_text('{"run_info.json": null}'), "output_dir of a training run"),
        (lambda folder: (folder / LIST_FILE).write_text("[]"), "no list of files with their sizes"),
    ],
)
def test_other_folders_are_never_replaced(make: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    make(target)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"is never replaced: .*{words}"):
        write(target, overwrite=True)
    assert contents(tmp_path) == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True, tokenizer="[]")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "tokenizer.json").is_file()


def test_what_a_killed_process_left_is_brought_to_its_end(tmp_path: Path) -> None:
    """It may have had this process's number, as in a container that was started again."""
    target, pid = tmp_path / "target", os.getpid()
    (tmp_path / f".target.writing-{pid}").mkdir()
    write(target, old="1")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    # killed between the two renames: the old folder is all there is
    target.rename(tmp_path / f".target.replaced-{pid}")
    with pytest.raises(ValueError, match="--overwrite"):
        write(target)
    assert contents(tmp_path).keys() == {"target/config.json", "target/old.json", f"target/{LIST_FILE}"}
    # killed right after them
    (target / "notes.txt").write_text("mine")
    target.rename(tmp_path / f".target.replaced-{pid}")
    write(tmp_path / "other")
    (tmp_path / "other").rename(target)
    write(target, overwrite=True, new="2")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert contents(target).keys() == {"config.json", "new.json", LIST_FILE, "notes.txt"}


@pytest.mark.parametrize("command", ["convert", "merge"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("models", "the source .* lies in the target"),
        ("models/lora", "is the source"),
        ("models/x/../lora/", "is the source"),
        ("link/lora", "is the source"),
        ("models/lora/merged", "lies in the source"),
        ("models/base", "is the base"),
        ("models/base/new", "lies in the base"),
        ("towers/clip", "is the vision tower"),
        ("towers", "the vision tower .* lies in the target"),
        ("towers/frames", "is the video tower"),
        ("owner/tower", "is the vision tower"),  # a name of the hub: it would be read from here from now on
    ],
)
def test_what_is_read_is_never_written(
    command: str, overwrite: list[str], target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that the adapter names and the towers that the config files name count too."""
    monkeypatch.chdir(tmp_path)
    files = {
        "models/lora/adapter_config.json": {"base_model_name_or_path": "models/base"},
        "models/lora/config.json": {"mm_vision_tower": str(tmp_path / "towers" / "clip")},
        "models/base/config.json": {"mm_vision_tower": "owner/tower", "mm_video_tower": "towers/frames"},
        "models/other/config.json": {},
        "towers/clip/config.json": {},
        "towers/frames/config.json": {},
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps(content))
    Path("link").symlink_to("models")
    before = contents(tmp_path)
    result = CliRunner().invoke(cli.app, [command, "models/lora", target, *overwrite])
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=words):
        raise result.exception
    assert contents(tmp_path) == before


# Folders of runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "target", "words"),
    [
        ({}, "llm", "is the model"),
        ({}, "llm/run", "lies in the model"),
        ({}, "", "the model .* lies in the output_dir"),
        ({}, "clip/../clip", "is the vision tower"),
        ({"pretrain_mm_mlp_adapter": "start/mm_projector.bin"}, "start", "projector's file .* lies in the output_dir"),
        ({"lora_enable": True, "lora_weight_path": "start"}, "start", "is the adapter of lora_weight_path"),
    ],
)
def test_a_run_does_not_write_where_it_reads(
    settings: dict[str, Any], target: str, words: str, world: TinyWorld
) -> None:
    (world.root / "start").mkdir(exist_ok=True)
    (world.root / "start" / "mm_projector.bin").write_bytes(b"")
    settings = {name: world.root / value if isinstance(value, str) else value for name, value in settings.items()}
    before = contents(world.root)
    with pytest.raises(ValueError, match=words):
        run(world, world.root / target, **settings)
    assert contents(world.root) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "run_info.json", "metrics.jsonl", "rejects.jsonl"])
def test_a_run_does_not_replace_the_files_of_others(name: str, world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=rf"output_dir .* holds {name}, which no run of this program wrote"):
        run(world, tmp_path)
    assert contents(tmp_path) == {name: b'{"mine": 1}'}


@pytest.mark.parametrize(
    ("result", "settings"),
    [
        ("adapter_model.safetensors", {}),
        ("model-00001-of-00002.safetensors", {"tune_mm_mlp_adapter": True}),
        ("mm_projector.bin", LORA),
    ],
)
def test_a_run_does_not_replace_the_result_of_another_kind(
    result: str, settings: dict[str, Any], world: TinyWorld, tmp_path: Path
) -> None:
    with checkpoint_folder(tmp_path) as folder:
        (folder / result).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds .* of another kind of run \((lora|full|projector)\)"):
        run(world, tmp_path, **settings)
    assert contents(tmp_path) == before


def test_a_run_does_not_replace_what_convert_wrote(world: TinyWorld, tmp_path: Path) -> None:
    with new_folder(tmp_path / "hf") as folder:
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds model\.safetensors of a checkpoint that no training run wrote there"):
        run(world, tmp_path / "hf")
    assert contents(tmp_path) == before


def test_a_run_goes_on_in_its_own_folder(world: TinyWorld, tmp_path: Path) -> None:
    """With what the user keeps there; also where a version of this program wrote it that made no list of its files."""
    notes = {"README.md": b"my project", "notes.txt": b"mine", "checkpoint-of-mine/weights": b"1"}
    for name, content in notes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    run(world, tmp_path, **LORA, save_strategy="steps", save_steps=1)
    listed = read_file_list(tmp_path) or {}
    assert listed["adapter_model.safetensors"] and "README.md" not in listed
    (tmp_path / LIST_FILE).unlink()
    (tmp_path / f".writing-{os.getpid()}").mkdir()
    run(world, tmp_path, **{**LORA, "max_steps": 2})
    assert json.loads((tmp_path / "run_info.json").read_text())["resumed_from"] == str(tmp_path / "checkpoint-1")
    assert contents(tmp_path).items() >= notes.items()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"holds config\.json, .* or which was changed since"):
        run(world, tmp_path, **{**LORA, "max_steps": 3})


def test_a_result_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    for names in (["adapter_config.json", "model-00001-of-00002.safetensors"], ["model.safetensors", "config.json"]):
        with checkpoint_folder(tmp_path) as folder:
            for name in names:
                (folder / name).write_text("text")
        (tmp_path / "notes.txt").write_text("mine")
    assert contents(tmp_path).keys() == {"model.safetensors", "config.json", LIST_FILE, "notes.txt"}
    assert read_file_list(tmp_path) == {"model.safetensors": 4, "config.json": 4}


def test_a_file_that_came_in_the_way_during_the_run_is_kept(tmp_path: Path) -> None:
    """At the end of a run it is too late to refuse: the result is written, and the stranger's file as well."""
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "adapter_config.json").write_text("would be read as a part of it")
    with checkpoint_folder(tmp_path) as folder:
        (folder / "config.json").write_text("the run's")
    assert (tmp_path / "config.json").read_text() == "the run's"
    kept = [path for path in tmp_path.iterdir() if ".kept-" in path.name]
    assert sorted(path.read_text() for path in kept) == ["mine", "would be read as a part of it"]


def test_checkpoints_of_other_programs_are_kept(tmp_path: Path) -> None:
    theirs = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for folder in theirs:
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    remove_old_checkpoints(tmp_path, step=9, limit=1)
    assert all(folder.is_dir() for folder in theirs)
    make_room(theirs[1])
    assert not theirs[1].exists() and len(list(tmp_path.glob("checkpoint-2.kept-*/trainer_state.json"))) == 1


def make_checkpoint(folder: Path) -> Path:
    """One of this program, with what someone added."""
    (folder / "global_step1").mkdir(parents=True)
    for name in ("trainer_state.json", "global_step1/shard"):
        (folder / name).write_text("{}")
    write_file_list(folder)
    (folder / "answers.jsonl").write_text("mine")
    return folder


def test_what_someone_put_into_a_checkpoint_is_kept(tmp_path: Path) -> None:
    """When the checkpoint is removed, and when it is written again."""
    for step in (1, 2):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    remove_old_checkpoints(tmp_path, step=2, limit=1)
    assert contents(tmp_path / "checkpoint-1") == {"answers.jsonl": b"mine"}
    assert len(contents(tmp_path / "checkpoint-2")) == 4
    make_room(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2").exists()
    (kept,) = tmp_path.glob("checkpoint-2.kept-*")
    assert contents(kept) == {"answers.jsonl": b"mine"}


def test_a_checkpoint_that_was_moved_to_another_disk_is_kept(tmp_path: Path) -> None:
    """A link has its place; the run does not end when it writes that checkpoint again."""
    elsewhere = make_checkpoint(tmp_path / "elsewhere")
    before = contents(elsewhere)
    link = tmp_path / "checkpoint-1"
    link.symlink_to(elsewhere)
    remove_old_checkpoints(tmp_path, step=9, limit=1)
    assert link.is_symlink()
    make_room(link)
    assert not link.is_symlink() and contents(elsewhere) == before


@pytest.mark.parametrize("name", ["../mine.txt", "sub/../../mine.txt", "{folder}/mine.txt"])
def test_a_list_names_no_files_elsewhere(name: str, tmp_path: Path) -> None:
    """A folder that came from somewhere could have them removed with its own."""
    (tmp_path / "mine.txt").write_text("mine")
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / LIST_FILE).write_text(json.dumps({name.format(folder=tmp_path): 4}))
    with pytest.raises(ValueError, match=r"is never replaced: .* is no list of files"):
        write(target, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_result_of_fsdp_that_is_cut_off_does_not_block_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes it, right into the folder."""

    def killed(self: Any, *args: Any) -> None:
        (tmp_path / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_model", killed)
    trainer = object.__new__(LLaVATrainer)
    trainer.is_fsdp_enabled = True
    trainer.args = cast(Any, SimpleNamespace(should_save=True, output_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert not foreign_files(tmp_path, CHECKPOINT_FILES)
    with checkpoint_folder(tmp_path) as folder:
        (folder / "model.safetensors").write_text("{}")
    assert read_file_list(tmp_path) == {"model.safetensors": 2}


def test_staging_of_a_process_with_the_same_number_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / f".writing-{os.getpid()}").mkdir()
    with atomic_folder(tmp_path) as folder:
        (folder / "a").touch()
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize("should_save", [True, False])
def test_all_ranks_hear_what_the_first_one_refuses(
    should_save: bool, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the others would wait for it in the next collective."""
    monkeypatch.setattr(output_dir, "gather_object", lambda problems: problems or ["what the first one says"])
    (tmp_path / "config.json").write_text('{"mine": 1}')
    arguments = parse_args(world.flags(tmp_path))
    training: Any = SimpleNamespace(**vars(arguments.training), should_save=should_save, world_size=2)
    words = r"holds config\.json" if should_save else "what the first one says"
    with pytest.raises(ValueError, match=words), output_dir.holding_output_dir(replace(arguments, training=training)):
        pass
    assert contents(tmp_path) == {"config.json": b'{"mine": 1}'}


def test_a_file_that_can_not_be_read_is_heard_of_too(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_dir, "remove_leftovers", Mock(side_effect=PermissionError(13, "Permission denied", "x")))
    with pytest.raises(ValueError, match=r"output_dir .*Permission denied: 'x'"):
        run(world, tmp_path)


def test_one_run_at_a_time(world: TinyWorld, tmp_path: Path) -> None:
    path = world.root / "run.yaml"
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in world.flags(tmp_path))
    path.write_text(json.dumps(flags))
    with lock(tmp_path / LOCK_FILE, "another run"):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"output_dir {tmp_path} is in use by process {os.getpid()} on"):
            run(world, tmp_path)
        assert contents(tmp_path) == before
        (finding,) = examine(path, []).errors
        assert finding.kind == "output" and f"is in use by process {os.getpid()}" in finding.message
    assert not list(tmp_path.iterdir())


# Answers ---------------------------------------------------------------------------------------------------------

QUESTION = {"question_id": 0, "text": "What?"}
ANSWER = {**QUESTION, "answer_id": "a", "model_id": "m", "metadata": {}}


@pytest.mark.parametrize(
    ("line", "overwrite", "words"),
    [
        (ANSWER, False, r"exists; choose another name, or pass .*--overwrite"),
        (QUESTION, True, "exists and holds no answers"),
        ("no JSON", True, "exists and holds no answers"),
    ],
)
def test_answers_replace_nothing_but_answers(line: Any, overwrite: bool, words: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    target = tmp_path / "answers.jsonl"
    target.write_text(json.dumps(line) + "\n")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words):
        model_vqa.evaluate("no model", tmp_path / "questions.jsonl", target, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_answers_do_not_replace_the_questions(tmp_path: Path) -> None:
    file = tmp_path / "answers-as-questions.jsonl"
    file.write_text(json.dumps(ANSWER) + "\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    with pytest.raises(ValueError, match="is the question file"):
        model_vqa.evaluate("no model", file, link, overwrite=True)
    assert json.loads(file.read_text()) == ANSWER


# Places that can't be written ------------------------------------------------------------------------------------


def test_unwritable_places_are_found_before_any_work(world: TinyWorld, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(QUESTION) + "\n")
    runner = CliRunner()
    answers = ["--question-file", str(questions), "--answers-file", str(file / "x" / "answers.jsonl")]
    commands = [["convert", "no-model", str(file / "x")], ["merge", "no-model", str(file / "x")]]
    commands[0][1] = commands[1][1] = str(world.llm)
    for command in [*commands, ["eval", "no-model", *answers]]:
        result = runner.invoke(cli.app, command)
        assert isinstance(result.exception, ValueError), command
        assert f"nothing can be written there ({file} is a file)" in str(result.exception)
    for target in (file, file / "x"):
        with pytest.raises(ValueError, match=rf"output_dir {target}: nothing can be written there \({file} is a file"):
            run(world, target, model_name_or_path=world.llm, data_path=world.data)
    assert contents(tmp_path) == {"file": b"not a folder", "questions.jsonl": questions.read_bytes()}


def test_the_cache_of_data_is_tried_before_it_is_used(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"HF_DATASETS_CACHE.*nothing can be written there"):
        run(world, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_is_tried_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b", "output")
    assert not list(tmp_path.iterdir())

    def denied(**kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("llava.files.tempfile.TemporaryFile", denied)
    with pytest.raises(ValueError, match=rf"output {tmp_path}/a: nothing .* \(Permission denied in {tmp_path}\)"):
        check_writable(tmp_path / "a", "output")


def test_a_projector_is_taken_out_into_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "mm_projector.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"mm_projector\.bin exists"):
        extract_projector(tmp_path / "no checkpoint", tmp_path / "mm_projector.bin")
    assert contents(tmp_path) == {"mm_projector.bin": b"mine"}


def test_sibling_folders_are_apart(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mm_projector.bin").touch()
    inputs = {
        "base": tmp_path / "pretrain",
        "file": tmp_path / "pretrain" / "mm_projector.bin",
        "hub": "a/b",
        "no": None,
    }
    check_apart(tmp_path / "pretrain-2", "output", inputs)
    check_apart(tmp_path / "pretrain" / "finetune", "output", {"file": inputs["file"]})
