"""Runs that are killed, stopped or run out of disk, and what the next start makes of what they left."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from llava.files import write_file_list
from llava.train.checkpoints.folders import (
    flaw_of,
    last_complete_checkpoint,
    remove_old_checkpoints,
    write_errors_named,
)
from llava.train.checkpoints.resume import is_finished
from llava.train.settings.arguments import TrainingArguments
from llava.train.settings.parsing import parse_args
from llava.train.train import checkpoint_to_resume, train
from llava.train.trainer import LLaVATrainer
from tests.ranks import Ranks, kill_in_step, kill_while_writing, slow_steps, train_in_ranks, zero_flags
from tests.results import KINDS, check_folder, check_losses, losses, make_projector
from tests.tiny_world import TinyWorld, make_tiny_world

EXTRAS: dict[str, dict[str, Any]] = {
    "full": {"group_by_modality_length": True, "mm_projector_lr": 5e-3},
    "lora": {"lora_dropout": 0.1, "weight_decay": 0.0},
    "projector": {},
}
STEPS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def flags_of(kind: str, stage: int, world: TinyWorld, folder: Path, **settings: Any) -> list[str]:
    """Four samples a step, three steps an epoch (two for the captions), checkpoints after steps 2 and 4."""
    common: dict[str, Any] = {
        "per_device_train_batch_size": 1 if stage else 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "weight_decay": 0.1,
        "warmup_ratio": 0.3,
        "lr_scheduler_type": "cosine",
        "learning_rate": 5e-3,
        "data_path": world.captions if kind == "projector" else world.data,
    }
    return world.flags(folder, **{**common, **KINDS[kind], **EXTRAS[kind], **zero_flags(stage), **settings})


@pytest.fixture(scope="module")
def projector(world: TinyWorld) -> Path:
    return make_projector(world)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "trap", "number", "goes_on_from"),
    [
        ("full", 0, kill_in_step, 1, None),  # nothing is written yet: it begins anew
        ("full", 2, kill_while_writing, 4, 2),
        ("full", 3, kill_in_step, 9, 4),  # in step 5: the first of the second epoch's last half
        ("lora", 0, kill_while_writing, 4, 2),
        ("lora", 2, kill_in_step, 6, 2),  # in the second half of step 3
        ("lora", 3, kill_while_writing, 4, 2),
        ("projector", 0, kill_in_step, 8, 2),
        ("projector", 2, kill_in_step, 9, 4),
        ("projector", 3, kill_in_step, 5, 2),
    ],
)
def test_sigkill(
    kind: str,
    stage: int,
    trap: Any,
    number: int,
    goes_on_from: int | None,
    world: TinyWorld,
    projector: Path,
    tmp_path: Path,
) -> None:
    """Started again after SIGKILL, it goes on from the last whole checkpoint; its losses are the whole run's."""
    ranks = 2 if stage else 1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin = {"pretrain_mm_mlp_adapter": projector / "mm_projector.bin"}
    train_in_ranks(flags_of(kind, stage, world, whole, **begin), ranks, tmp_path / "whole.log")
    flags = flags_of(kind, stage, world, parts, **begin)
    victim = ranks - 1 if trap is kill_in_step else 0
    codes = Ranks(flags, ranks, log=tmp_path / "killed.log", before=trap, arguments=(victim, number)).join()
    assert codes[victim] == -9
    train_in_ranks(flags, ranks, tmp_path / "parts.log")
    log = (tmp_path / "parts.log").read_text()
    assert (f"resuming from {parts}/checkpoint-{goes_on_from}" in log) == (goes_on_from is not None)
    check_losses(whole, STEPS)
    expected = pytest.approx(losses(whole), rel=1e-5)
    assert losses(parts) == expected
    steps = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["loss"] for line in steps if "loss" in line} == expected
    assert len(steps) == STEPS + 1  # and the summary
    for folder in (whole / "checkpoint-4", parts / "checkpoint-4", parts):
        check_folder(folder, kind, world, projector)
    assert not (parts / ".incomplete").exists()


# Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "number", "workers"),
    [("lora", 0, signal.SIGINT, 1), ("projector", 0, signal.SIGUSR1, 0), ("projector", 2, signal.SIGTERM, 0)],
)
def test_a_signal_ends_the_run_with_a_checkpoint(
    kind: str, stage: int, number: int, workers: int, world: TinyWorld, tmp_path: Path
) -> None:
    """Sent to one rank only; all stop after the same step, and the next start goes on from there."""
    ranks = 2 if stage else 1
    folder = tmp_path / "run"
    flags = flags_of(kind, stage, world, folder, save_strategy="no", dataloader_num_workers=workers)
    run = Ranks(flags, ranks, log=tmp_path / "log", before=slow_steps, arguments=(0.2,))
    run.wait_for("step 2 begins")
    run.signal(number, ranks - 1)
    assert run.join() == [75] * ranks, run.printed()[-3000:]
    name = signal.Signals(number).name
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 2 <= step < STEPS
    assert f"stopped by {name} after step {step} of {STEPS}" in run.printed()
    assert flaw_of(checkpoint) is None
    assert not (folder / "config.json").exists()  # no result is written

    train_in_ranks(flags, ranks, tmp_path / "again.log")
    assert f"resuming from {checkpoint}" in (tmp_path / "again.log").read_text()
    assert list(losses(folder)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_ranks_on_the_cpu_leave_no_shared_memory(world: TinyWorld, tmp_path: Path) -> None:
    run = Ranks(flags_of("projector", 2, world, tmp_path / "run", max_steps=1), 2, log=tmp_path / "log")
    assert run.join() == [0, 0]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{run.port}_*"))


def test_a_second_ctrl_c_ends_the_run_at_once(world: TinyWorld, tmp_path: Path) -> None:
    flags = flags_of("projector", 0, world, tmp_path / "run")
    run = Ranks(flags, log=tmp_path / "log", before=slow_steps, arguments=(60,))
    run.wait_for("step 1 begins")
    run.signal(signal.SIGINT, 0)
    run.wait_for("SIGINT: writing a checkpoint")
    run.signal(signal.SIGINT, 0)
    assert run.join(timeout=10) == [-signal.SIGINT]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_workers_outlive_the_signals_of_a_scheduler(world: TinyWorld, tmp_path: Path) -> None:
    """All processes of a job are signalled; data loading must go on until the step is done."""
    loading = {"dataloader_num_workers": 1, "per_device_train_batch_size": 1}  # most is still to be read by then
    flags = flags_of("projector", 0, world, tmp_path / "run", **loading)
    run = Ranks(flags, log=tmp_path / "log", before=slow_steps, arguments=(0.2, True))
    assert run.join() == [75], run.printed()[-3000:]
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_signals_have_their_old_meaning_after_training(world: TinyWorld, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    train(parse_args(flags_of("projector", 0, world, tmp_path, max_steps=1)))
    assert {number: signal.getsignal(number) for number in before} == before


# The end of a run ------------------------------------------------------------------------------------------------


def write_slowly(rank: int, seconds: float) -> None:
    """Trap: the writing of the result is announced and takes longer."""
    from llava.train import trainer

    whole = trainer.save_run

    def save_run(*args: Any, **kwargs: Any) -> None:
        if kwargs["writer"]:
            print("the result is being written", file=sys.stderr, flush=True)
            time.sleep(seconds)
        whole(*args, **kwargs)

    trainer.save_run = save_run


def test_signals_wait_for_the_result(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step: before the result is written, while it is, and before the state that makes it whole."""
    from llava.train import trainer as module

    sent: list[int] = []

    def signalled(owner: Any, name: str, number: int) -> None:
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(number)
            os.kill(os.getpid(), number)
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def too_early(number: int, frame: Any) -> None:
        raise AssertionError(f"{signal.Signals(number).name} ends the run")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    outside = {number: signal.signal(number, too_early) for number in numbers}
    signalled(module.LLaVATrainer, "raise_if_stopped", signal.SIGUSR1)
    signalled(module, "save_run", signal.SIGTERM)
    signalled(module, "atomic_folder", signal.SIGINT)
    flags = flags_of("projector", 0, world, tmp_path, save_strategy="no", max_steps=2)
    try:
        trainer = train(parse_args(flags))
    finally:
        for number, handler in outside.items():
            signal.signal(number, handler)
    assert sent == [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    assert trainer is not None
    assert trainer.state.global_step == 2
    assert train(parse_args(flags)) is None  # it is whole: nothing is left to do


@pytest.mark.slow
def test_no_rank_ends_before_the_result_is_whole(world: TinyWorld, tmp_path: Path) -> None:
    """A rank that a signal ended by then would make its launcher end the one that writes."""
    flags = flags_of("projector", 0, world, tmp_path / "run", max_steps=1, save_strategy="no")
    run = Ranks(flags, 2, log=tmp_path / "log", before=write_slowly, arguments=(1.0,))
    run.wait_for("the result is being written")
    time.sleep(0.3)
    run.signal(signal.SIGTERM, 0, 1)
    assert run.join() == [0, 0], run.printed()[-3000:]
    assert run.printed().count("SIGTERM: the last step is under way or done") == 2
    assert (tmp_path / "run" / "mm_projector.bin").is_file()


def mtimes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("limit", "more"),
    [
        ({"max_steps": 3}, {"max_steps": 4}),
        ({"max_steps": 3, "streaming": True}, {"max_steps": 4, "streaming": True}),
        ({"max_steps": None, "num_train_epochs": 1.5}, {"max_steps": None, "num_train_epochs": 2}),
    ],
)
def test_a_finished_run_is_left_as_it_is(
    limit: dict[str, Any], more: dict[str, Any], world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Started again it says so; with more steps or epochs it goes on."""
    caplog.set_level("INFO", "llava")

    def start(settings: dict[str, Any]) -> Any:
        return train(parse_args(flags_of("projector", 0, world, tmp_path, **settings)))

    end = start(limit).state.global_step
    before = mtimes(tmp_path)
    caplog.clear()
    assert start(limit) is None
    assert mtimes(tmp_path) == before
    assert f"{tmp_path} holds the result of this run, after step {end}" in caplog.text
    trainer = start(more)
    assert trainer.state.global_step == trainer.state.max_steps == end + 1
    assert list(losses(tmp_path)) == list(range(1, end + 2))


def test_a_finished_run_is_known_by_another_path(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would be trained anew and its result replaced."""
    settings = {"save_strategy": "no", "max_steps": 1}
    assert train(parse_args(flags_of("projector", 0, world, tmp_path / "run", **settings))) is not None
    monkeypatch.chdir(tmp_path)
    assert train(parse_args(flags_of("projector", 0, world, Path("run"), **settings))) is None
    (tmp_path / "run").rename(tmp_path / "copied")
    assert train(parse_args(flags_of("projector", 0, world, Path("copied"), **settings))) is None


def test_a_result_that_is_not_whole_is_not_called_finished(world: TinyWorld, tmp_path: Path) -> None:
    """As after a copy that broke off; nor is it trained again unasked."""
    flags = flags_of("lora", 0, world, tmp_path, save_strategy="no", max_steps=1)
    train(parse_args(flags))
    (tmp_path / "tokenizer_config.json").unlink()
    before = mtimes(tmp_path)
    with pytest.raises(ValueError, match=r"the result of this run, but tokenizer_config\.json is missing"):
        train(parse_args(flags))
    assert mtimes(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("train_config.yaml", "", r"train_config\.yaml is not valid YAML"),
        ("train_config.yaml", "a: [", r"train_config\.yaml is not valid YAML"),
        ("trainer_state.json", '{"a":', r"trainer_state\.json is no valid JSON"),
    ],
)
def test_a_finished_run_that_can_not_be_read_is_left_as_it_is(
    name: str, text: str, words: str, world: TinyWorld, tmp_path: Path
) -> None:
    flags = flags_of("projector", 0, world, tmp_path, max_steps=1)
    (tmp_path / "mm_projector.bin").write_text("")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 1, "epoch": 1}')
    (tmp_path / "train_config.yaml").write_text(json.dumps(parse_args(flags).given, default=str))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        is_finished(parse_args(flags))


def test_another_run_in_the_folder_of_a_finished_one(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for finished, neither at once nor after it was begun and killed."""
    settings = {"save_strategy": "no", "max_steps": 1}
    first = flags_of("projector", 0, world, tmp_path, **settings)
    other = flags_of("projector", 0, world, tmp_path, **settings, seed=1)
    assert train(parse_args(first)) is not None
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(LLaVATrainer, "train", Mock(side_effect=KeyboardInterrupt))
        train(parse_args(other))
    assert train(parse_args(other)) is not None
    assert train(parse_args(other)) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_checkpoint_of_the_last_step_becomes_the_result(streaming: bool, world: TinyWorld, tmp_path: Path) -> None:
    """As where a run was killed while it wrote the result: no step is trained beyond the last."""
    settings = {"max_steps": 3, "save_steps": 3, "streaming": streaming}
    flags = flags_of("projector", 0, world, tmp_path, **settings)
    train(parse_args(flags))
    weights = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    (tmp_path / "mm_projector.bin").unlink()
    trainer = train(parse_args(flags))
    assert trainer is not None
    assert trainer.state.global_step == 3
    again = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train_loss" not in last


# Torn checkpoints and full disks ---------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "weights").write_bytes(b"1234")
    write_file_list(folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "weights").write_bytes(b"12"), "weights has 2 bytes of 4"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "files.json").write_text("{"), "files.json is not valid JSON"),
    ],
)
def test_a_torn_checkpoint_is_skipped_by_name(
    harm: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, torn = make_checkpoint(tmp_path / "checkpoint-9"), make_checkpoint(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path) == str(torn)
    assert not caplog.records
    harm(torn)
    assert last_complete_checkpoint(tmp_path) == str(whole)
    assert f"{torn} is not whole and is skipped: {words}" in caplog.text


def test_a_checkpoint_of_another_program_is_whole(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1")
    (checkpoint / "files.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)


def test_torn_checkpoints_never_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 20):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    for step in (6, 20):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    remove_old_checkpoints(tmp_path, step=8, limit=2, keep=str(tmp_path / "checkpoint-2"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-2", "checkpoint-20", "checkpoint-4", "checkpoint-8"]
    remove_old_checkpoints(tmp_path, step=8, limit=None)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_no_error_of_writing_keeps_its_name(tmp_path: Path) -> None:
    """A full GPU while weights are gathered is no full disk, nor is a lost rank."""
    for error in (torch.cuda.OutOfMemoryError("out of memory"), torch.distributed.DistBackendError("remote")):
        with pytest.raises(type(error)), write_errors_named(tmp_path / "checkpoint-1", tmp_path):
            raise error


def test_which_checkpoint_is_resumed(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path / "checkpoint-1"), make_checkpoint(tmp_path / "checkpoint-2")
    arguments = TrainingArguments(output_dir=str(tmp_path))
    assert checkpoint_to_resume(arguments) == str(new)
    arguments.resume_from_checkpoint = str(old)
    assert checkpoint_to_resume(arguments) == str(old)
    arguments.resume_from_checkpoint = "True"
    assert checkpoint_to_resume(arguments) == str(new)
    (old / "weights").unlink()
    for asked, words in ((old, "weights is missing"), (tmp_path / "checkpoint-3", "no such folder")):
        arguments.resume_from_checkpoint = str(asked)
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*{asked.name}: {words}"):
            checkpoint_to_resume(arguments)


def full_disk(rank: int, step: int, what: str) -> None:
    """Trap: checkpoint-`step` can't be written: its weights, its optimizer, or its last file."""
    from llava.train.trainer import LLaVATrainer

    methods = {"weights": "save_model", "optimizer": "_save_optimizer_and_scheduler", "state": "_save_pending_loss"}
    whole = getattr(LLaVATrainer, methods[what])

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step != step:
            whole(self, *args, **kwargs)
        elif what == "state":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:  # the system refuses to write longer files than the log has become
            size, (_, hard) = os.fstat(1).st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))
            try:
                whole(self, *args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    setattr(LLaVATrainer, methods[what], save)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "what"),
    [
        ("full", 0, "weights"),
        ("lora", 0, "weights"),
        ("full", 0, "optimizer"),
        ("projector", 2, "optimizer"),
        ("projector", 0, "state"),
    ],
)
def test_a_full_disk(kind: str, stage: int, what: str, world: TinyWorld, tmp_path: Path) -> None:
    """One line says what could not be written and what is left; with space, the same command ends the run."""
    ranks, folder = 2 if stage else 1, tmp_path / "run"
    flags = flags_of(kind, stage, world, folder, save_total_limit=2)
    run = Ranks(flags, ranks, log=tmp_path / "log", before=full_disk, arguments=(4, what))
    assert 74 in run.join(), run.printed()[-3000:]
    printed = run.printed()
    assert f"{folder}/checkpoint-4 could not be written: " in printed
    assert "GB are free there" in printed
    assert f"{folder}/checkpoint-2 is whole: start the same command again to go on from it" in printed
    assert "Traceback" not in printed
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-2", "logs"]
    train_in_ranks(flags, ranks, tmp_path / "again.log")
    assert list(losses(folder)) == list(range(1, STEPS + 1))
