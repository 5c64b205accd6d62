"""Signals on their way from a terminal or scheduler to the ranks, and exit codes on their way back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llava.train.launching import torchrun
from tests.ranks import Ranks, free_port
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world

# A rank that needs a while to end after a signal, with a child of its own that must not be signalled.
RANK = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
def stop(number, frame):
    time.sleep(0.3)
    code = 75 if child.poll() is None else 3
    child.kill()
    print("stopped by", signal.Signals(number).name, flush=True)
    os._exit(code)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(30)
"""
# A launcher that ends at once on the signals, as launchers do, and otherwise with its rank's exit code.
LAUNCHER = """
import os, subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": "0"}).returncode)
"""


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    settings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    settings |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{settings['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines up to the one that has `text`."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was not printed:\n{''.join(lines)[-3000:]}")


@pytest.fixture
def supervised() -> Any:
    process = start([sys.executable, "llava/train/launching/supervise.py", sys.executable, "-c", LAUNCHER, RANK])
    wait_for(process, "ready")
    yield process
    process.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_go_to_the_ranks_and_their_exit_code_comes_back(name: str, supervised: Any) -> None:
    supervised.send_signal(getattr(signal, name))
    printed, _ = supervised.communicate(timeout=10)
    assert f"stopped by {name}" in printed
    assert supervised.returncode == 75


def test_a_second_ctrl_c_kills_all(supervised: Any) -> None:
    supervised.send_signal(signal.SIGINT)
    time.sleep(0.1)
    supervised.send_signal(signal.SIGINT)
    printed, _ = supervised.communicate(timeout=10)
    assert "stopped" not in printed
    assert supervised.returncode == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_launcher_does_not_outlive_a_killed_supervisor(supervised: Any) -> None:
    (launcher,) = psutil.Process(supervised.pid).children()
    ranks = launcher.children(recursive=True)
    supervised.kill()
    _, alive = psutil.wait_procs([launcher], timeout=10)
    for process in ranks:  # a real launcher ends them; this one can't
        process.kill()
    assert not alive


def test_exit_codes_by_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.exit(75 if os.environ['RANK'] == '1' else 0)")
    arguments = ["--nproc_per_node", "2", "--master_port", str(free_port()), str(program)]
    assert torchrun.main(arguments) == 75


def fail_in_step(rank: int, victim: int, step: int) -> None:
    """Trap: a rank finds a mistake in a step, in which the others wait for it."""
    from llava.train.trainer import LLaVATrainer

    whole = LLaVATrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == victim and self.state.global_step + 1 == step:
            raise ValueError("sample 'x' can't be read")
        return whole(self, *args, **kwargs)

    LLaVATrainer.compute_loss = compute_loss  # type: ignore[method-assign]


@pytest.mark.slow
def test_an_error_of_one_rank_is_not_buried_by_the_others(tmp_path: Path) -> None:
    """Theirs follow from it: one line, and they stay long enough for a launcher to find the cause's exit code."""
    world: TinyWorld = make_tiny_world(tmp_path / "world")
    settings = {"tune_mm_mlp_adapter": True, "data_path": world.captions, "version": "plain", "max_steps": 3}
    flags = world.flags(tmp_path / "run", **settings)
    run = Ranks(flags, 2, log=tmp_path / "log", before=fail_in_step, arguments=(1, 2))
    run.processes[1].join(60)
    time.sleep(1)
    assert run.processes[0].is_alive()
    assert run.join() == [1, 2]
    printed = run.printed()
    assert "ERROR: sample 'x' can't be read" in printed
    assert "rank 0 ends because another has ended, which says why (Connection closed by peer)" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_run_by_a_launcher_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to the shell script, as a scheduler sends it."""
    world: TinyWorld = make_tiny_world(tmp_path / "world")
    settings = {"tune_mm_mlp_adapter": True, "data_path": world.captions, "version": "plain", "max_steps": 10_000}
    flags = world.flags(tmp_path / "run", **settings, bf16=True)
    process = start(["bash", "scripts/v1_5/pretrain.sh", *flags], NUM_GPUS="2", MASTER_PORT=str(free_port()))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"after step {checkpoint.name.removeprefix('checkpoint-')} of 10000" in printed
