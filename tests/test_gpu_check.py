"""`scripts/gpu_check.sh` rehearsed on the CPU: its parts, its limits of time, and the packages that it brings along."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import BENCH, REPORT, TESTS, Clock, Piece, Sizes, check_speed, pieces
from llava.cost.command import all_methods
from tests.conftest import ROOT
from tests.test_bench import small

__all__ = ["small"]  # a fixture

SCRIPT = ROOT / "scripts/gpu_check.sh"


def load_gathering() -> Any:
    spec = importlib.util.spec_from_file_location("gather_wheels", ROOT / "scripts/gather_wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gathering = load_gathering()


def check(*arguments: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **kwargs)


def test_both_parts_run_and_report(small: Path, tmp_path: Path) -> None:
    """The script itself, with a tiny model in the place of 7B."""
    quick = ["--select", "bf16-weights-none or (counted and packed)"]
    quick += ["--method", "fastv", "--rounds", "1", "--batch", "1/2"]
    result = check("--device", "cpu", "--model", small, "--out", "results", *quick, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "results"
    tests, bench = (json.loads((out / name).read_text()) for name in (TESTS, BENCH))
    assert {one["outcome"] for one in tests["results"].values()} == {"passed"}
    assert len(tests["results"]) >= 5
    assert tests["not_run"] == []
    assert list(bench["results"]) == ["fastv, answer", "fastv, training"]
    assert bench["results"]["fastv, training"]["setting"]["trains"] == "lora"
    assert bench["setting"]["versions"]["torch"] == torch.__version__
    text = (out / REPORT).read_text()
    assert f"{len(tests['results'])} passed, 0 failed, 0 skipped." in text
    assert text.count("| fastv |") == 6  # times, ratios and causes, twice
    assert sorted(file.name for file in (out / "traces/answer").iterdir()) == ["fastv.json", "none.json"]
    assert not (out / "venv").exists()  # nothing was missing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--minute", "3"], "unknown option --minute"),
        (["--minutes", "ten"], "--minutes ten: expected a number"),
        (["--from", "nowhere"], "nowhere: no such folder"),
        (["--out"], "--out needs a value"),
    ],
)
def test_wrong_options_are_named(wrong: list[str], message: str) -> None:
    result = check(*wrong)
    assert result.returncode == 2
    assert message in result.stderr


# Time


class Running:
    """A clock on which each call of `has` takes a minute."""

    def __init__(self, minutes: int) -> None:
        self.left = minutes

    def has(self, seconds: float = 0.0) -> bool:
        self.left -= 1
        return self.left >= 0


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path, capsys: Any
) -> None:
    written = []

    def run(plan: Any) -> dict[str, Any]:
        method = next(iter(plan.methods))
        if method == "trim":
            raise RuntimeError("CUDA out of memory")
        written.append((tmp_path / BENCH).is_file())
        return original(plan)

    original = gpu_check.run
    monkeypatch.setattr(gpu_check, "run", run)
    sizes = Sizes(str(small), "cpu", torch.float32, answers=(1,), rounds=1)
    wanted = [Piece("answer", name, name) for name in ("prumerge", "trim", "fastv", "pyramiddrop", "random")]
    assert not check_speed(tmp_path, Running(3), sizes, wanted)
    content = json.loads((tmp_path / BENCH).read_text())
    assert list(content["results"]) == ["prumerge, answer", "fastv, answer"]
    assert "CUDA out of memory" in content["failed"]["trim, answer"]
    assert content["not_run"] == ["pyramiddrop, answer", "random, answer"]
    assert written == [False, True]  # each is written before the next begins
    text = (tmp_path / REPORT).read_text()
    assert "Not run, for want of time: pyramiddrop, answer; random, answer." in text
    assert "### trim, answer: failed" in text
    assert text.count("| none |") == 3  # once a table


def test_tests_end_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = gpu_check.Recorder(tmp_path, Running(1), "cpu")
    file = tmp_path / "test_some.py"
    lines = ["import pytest", "def test_a(): pass", "def test_b(): pytest.skip('no flash-attn')", "def test_c(): pass"]
    file.write_text("\n".join(lines))
    pytest.main([str(file), "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    content = json.loads((tmp_path / TESTS).read_text())
    outcomes = {name.partition("::")[2]: one["outcome"] for name, one in content["results"].items()}
    assert outcomes == {"test_a": "passed", "test_b": "skipped"}
    assert [name.partition("::")[2] for name in content["not_run"]] == ["test_c"]
    text = (tmp_path / REPORT).read_text()
    assert "1 passed, 0 failed, 1 skipped; 1 not run, for want of time: from `test_c` on." in text
    assert "- skipped 1: no flash-attn" in text


def test_a_failed_test_is_shown(tmp_path: Path) -> None:
    recorder = gpu_check.Recorder(tmp_path, Clock(10), "cpu")
    file = tmp_path / "test_broken.py"
    file.write_text("def test_a(): assert 1 == 2, 'kernels differ'\n")
    pytest.main([str(file), "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    text = (tmp_path / REPORT).read_text()
    assert "0 passed, 1 failed, 0 skipped." in text
    assert "### `test_a`" in text
    assert "kernels differ" in text


def test_every_method_is_measured() -> None:
    assert {piece.method for piece in pieces(None)} == all_methods().keys()
    assert [piece.name for piece in pieces(None)][:2] == ["prumerge, answer", "prumerge, training"]
    with pytest.raises(ValueError, match="--method prumerg: choose of"):
        pieces(["prumerg"])


# Packages


def test_what_is_needed_beside_torch() -> None:
    listed = gathering.requirements()
    names = {one.partition(">")[0] for one in listed}
    assert {"transformers", "peft", "numpy", "pytest"} <= names
    assert not names & {"torch", "pytest-xdist", "deepspeed", "datasets", "ruff"}


def test_wheels_are_gathered_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for pip, which takes what it finds in the folder that it is pointed at."""
    calls = []

    def pip(command: list[str], check: bool, env: dict[str, str]) -> None:
        folder, found = (Path(command[command.index(flag) + 1]) for flag in ("--dest", "--find-links"))
        calls.append(command)
        assert Path(env["PIP_CONSTRAINT"]).read_text() == "torch==9999\n"
        stand_in = found / "torch-9999-py3-none-any.whl"
        assert "Name: torch\n" in zipfile.ZipFile(stand_in).read("torch-9999.dist-info/METADATA").decode()
        (folder / stand_in.name).write_bytes(stand_in.read_bytes())
        (folder / "some-1-py3-none-any.whl").write_bytes(b"12345")

    monkeypatch.setattr(gathering.subprocess, "run", pip)
    assert gathering.gather(tmp_path, "3.12", "manylinux_2_18_aarch64") == 5
    assert [file.name for file in tmp_path.iterdir()] == ["some-1-py3-none-any.whl"]
    (command,) = calls
    assert command[command.index("--python-version") + 1] == "3.12"
    given = [command[i + 1] for i, part in enumerate(command) if part == "--platform"]
    assert given == ["manylinux_2_18_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert "transformers>=5.23,<5.24" in command
    monkeypatch.setattr(gathering, "MOST_BYTES", 4)
    with pytest.raises(ValueError, match="more than 0: gather for one Python a folder"):
        gathering.gather(tmp_path, "3.12", "linux_x86_64")


def test_gathering_for_a_python_that_is_too_old() -> None:
    result = check("--wheels", "wheels", "--python", "3.10")
    assert result.returncode == 2
    assert "--python 3.10: expected 3.11 to 3.13" in result.stderr
