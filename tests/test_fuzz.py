"""A few cases of the fuzz, and what its judge sees; CONTRIBUTING.md says how to run more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import run_case, summary
from tests.fuzz.case import World
from tests.fuzz.judge import changes, flaw_of_message, snapshot
from tests.fuzz.processes import start_server

SEED = 4
# An unknown setting, a torn file, a cut config, a copy onto its source, a conversion killed, two evaluations at once.
CASES = {"settings": 2, "data": 2, "checkpoints": 0, "places": 1, "signals": 4, "together": 2}


@pytest.mark.slow
def test_a_case_of_each_area(tmp_path: Path) -> None:
    start_server()
    world = World.make(tmp_path)
    lines = [run_case(world, SEED, area, number) for area, number in CASES.items()]
    assert not any(line["problems"] for line in lines), summary(lines)


def test_the_judge_sees_what_happens_to_files(tmp_path: Path) -> None:
    for name in ("run/weights.bin", "run/my_notes.txt", "mine/a.txt", "mine/b.txt", "same.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    for name in ("run/weights.bin", "run/my_notes.txt", "mine/a.txt", "out/model.bin", "stray/deep/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("other")
    (tmp_path / "mine/b.txt").unlink()
    assert changes(before, snapshot(tmp_path), outputs=["out"], own=["run"]) == [
        "changed mine/a.txt",
        "deleted mine/b.txt",
        "changed run/my_notes.txt",
        "left stray",
    ]


@pytest.mark.parametrize(
    ("printed", "flaw"),
    [
        ("INFO x\n12:00:00 ERROR llava: --seed -1: expected at least 0\n", None),
        ("12:00:00 ERROR llava: the run would fail:\nerror: model: --seed x\nerror: data: y\n", None),
        ("error: --seed -1: expected at least 0\n", None),
        ("Usage: llava train [OPTIONS]\nNo such option\n", None),
        ("error: -1 is too small\n", "the error names nothing of --seed"),
        ("error: --seed\nerror: --seed\n", "2 error lines"),
        ("nothing\n", "0 error lines"),
        ("Traceback (most recent call last):\nKeyError: 'x'\nerror: --seed\n", "traceback"),
    ],
)
def test_the_judge_reads_what_is_said(printed: str, flaw: str | None) -> None:
    assert flaw_of_message(printed, {"--seed"}) == flaw
