"""Runs over several machines, as two nodes on this one: torchrun, Slurm, DeepSpeed's hostfile."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.train.config import LaunchOptions
from llava.train.launch import launch_command
from llava.train.parsing import parse_args
from llava.train.train import train
from tests.test_deepspeed import free_port, losses
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++"),
]

# Starts the tasks of two nodes on this machine, as srun does on two, and ends with the highest of their exit codes.
SRUN = """
import os, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
steps = []
for node in range(2):
    slurm = {"SLURM_PROCID": node, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2, "SLURM_NODEID": node}
    steps.append(subprocess.Popen(command, env={**os.environ, **{k: str(v) for k, v in slurm.items()}}))
sys.exit(max(step.wait() for step in steps))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    print("localhost")
    print("node-1")
else:
    open(os.environ["REQUEUED"], "w").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def settings_of(world: TinyWorld, folder: Path, **changes: Any) -> dict[str, Any]:
    """A LoRA run under ZeRO-2 whose global batch is the same on any number of processes."""
    settings = {"lora_enable": True, "lora_r": 4, "per_device_train_batch_size": 1, "global_batch_size": 4}
    flags = world.flags(folder, **{**settings, "dataloader_num_workers": 0, **changes})
    return dict(flag[2:].split("=", 1) for flag in flags)


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    return {**kept, **own, **variables}


@pytest.fixture(scope="module")
def expected(world: TinyWorld) -> list[float]:
    """The losses of one process."""
    folder = world.root / "alone"
    train(parse_args([f"--{key}={value}" for key, value in settings_of(world, folder).items()]))
    return losses(folder)


def test_torchrun_on_two_nodes(world: TinyWorld, expected: list[float], tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path / "run", deepspeed=ROOT / "scripts/zero2.json")
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
            + ["--master_addr=localhost", f"--master_port={port}", str(ROOT / "llava/train/train_mem.py")]
            + [f"--{key}={value}" for key, value in settings.items()],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(error[-2000:] for error in errors)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-2)


def sbatch(folder: Path, arguments: list[str], srun: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm would, with stand-ins for Slurm's commands."""
    for name, code in (("srun", srun), ("scontrol", SCONTROL)):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_SUBMIT_DIR": str(ROOT)}
    variables = environment(MASTER_PORT=str(free_port()), REQUEUED=str(folder / "requeued"), **slurm)
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{variables['PATH']}"
    variables["VIRTUAL_ENV"] = sys.prefix
    command = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_slurm_on_two_nodes(world: TinyWorld, expected: list[float], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings_of(world, tmp_path / "run", deepspeed=ROOT / "scripts/zero2.json")))
    result = sbatch(tmp_path, [str(config)], SRUN)
    assert result.returncode == 0, result.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-2)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (2, False)])
def test_slurm_queues_a_stopped_run_again(status: int, requeued: bool, tmp_path: Path) -> None:
    result = sbatch(tmp_path, ["any.yaml"], f"import sys\nsys.exit({status})")
    assert result.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7"


def test_slurm_hands_the_signal_to_its_tasks(tmp_path: Path) -> None:
    """The step ends on its own terms: the batch script waits for what it writes."""
    waits = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(75)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    result = sbatch(tmp_path, ["any.yaml"], waits)
    assert result.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7"


def test_the_command_for_a_hostfile() -> None:
    options = LaunchOptions(hostfile="hosts", master_port=1234)
    command = launch_command(["--deepspeed=zero2.json", "--output_dir=out"], options)
    assert command is not None
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[3:7] == ["--hostfile", "hosts", "--master_port", "1234"]
    assert "--num_gpus" not in command
