"""The losses of two runs side by side."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts/compare_losses.py"


def write_run(folder: Path, losses: dict[int, float | None]) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": loss, "learning_rate": 1e-3} for step, loss in losses.items()]
    lines.append({"step": max(losses), "train_runtime": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_two_runs(tmp_path: Path, capsys: Any) -> None:
    first = write_run(tmp_path / "a", {1: 2.0, 2: 1.5, 3: 1.25})
    second = write_run(tmp_path / "b", {1: 2.0, 2: 1.5, 3: 1.0, 4: 0.5})
    code, out, _ = run(capsys, first, second, "--tolerance", 0.1)
    assert code == 1
    assert "3 steps in both; 0 and 1 steps stand in one run only" in out
    assert "difference: mean 0.0833, widest 0.25 at 3" in out
    assert "1 steps differ by more than 0.1, the first is 3" in out
    assert run(capsys, first, second / "metrics.jsonl", "--tolerance", 0.3)[0] == 0
    assert run(capsys, first, second)[0] == 0


def test_a_loss_that_is_not_finite_differs(tmp_path: Path, capsys: Any) -> None:
    first = write_run(tmp_path / "a", {1: 2.0, 2: None})
    second = write_run(tmp_path / "b", {1: 2.0, 2: None})
    assert run(capsys, first, second, "--tolerance", 1)[0] == 1


def test_long_runs_are_shown_in_few_rows(tmp_path: Path, capsys: Any) -> None:
    losses: dict[int, float | None] = {step: 1 / step for step in range(1, 1001)}
    first, second = write_run(tmp_path / "a", losses), write_run(tmp_path / "b", losses)
    code, out, _ = run(capsys, first, second, "--rows", 5, "--tolerance", 0)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["1", "251", "501", "750", "1000"]


def test_the_plot(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "a", {1: 2.0, 2: 1.5})
    second = write_run(tmp_path / "b", {1: 2.0, 2: 1.0})
    assert run(capsys, first, second, "--plot", tmp_path / "losses.png")[0] == 0
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line has the key 'loss'"),
        ("not json\n", "line 1: not a line of a run's log"),
        ('{"loss": 1}\n', "line 1: not a line of a run's log"),
        ('{"step": 7, "loss": 1}\n', "no step in common"),
    ],
)
def test_what_is_no_run(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    first = write_run(tmp_path / "a", {1: 2.0})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text(text)
    code, _, err = run(capsys, first, tmp_path / "b")
    assert code == 2
    assert message in err
    assert "does not exist" in run(capsys, first, tmp_path / "nowhere")[2]
