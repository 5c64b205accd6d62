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

from llava.train.launching.launch import launch_command
from llava.train.settings.config import LaunchOptions
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.test_arguments import script_flags
from tests.test_deepspeed import free_port, losses
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++"),
]

# Starts the tasks of two nodes on this machine, as srun does on two. A task that ends with an error ends the others,
# and its exit code counts. SIGNALLED: a signal comes to all processes of the step after a while.
SRUN = """
import os, signal, subprocess, sys, time
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
steps = []
for node in range(2):
    slurm = {"SLURM_PROCID": node, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2, "SLURM_NODEID": node}
    environment = {**os.environ, **{k: str(v) for k, v in slurm.items()}}
    steps.append(subprocess.Popen(command, env=environment, start_new_session=True))
if "SIGNALLED" in os.environ:
    time.sleep(1)
    for step in steps:
        os.killpg(step.pid, signal.SIGTERM)
codes = []
while len(codes) < len(steps):
    time.sleep(0.05)
    codes = [step.poll() for step in steps if step.poll() is not None]
    if any(codes):
        for step in steps:
            if step.poll() is None:
                os.killpg(step.pid, signal.SIGKILL)
        break
sys.exit(max(codes))
"""
# In place of a training: the ranks need different times for their checkpoints.
STOPS = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(rank), sys.exit(75)))
time.sleep(60)
"""
FAILS = "import sys\nsys.exit(2)"
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


def sbatch(folder: Path, arguments: list[str], llava: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm would, with stand-ins for Slurm's commands and, if given, for the training."""
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL), ("llava", llava)):
        if code:
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!{sys.executable}\n{code}")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_SUBMIT_DIR": str(folder)}
    variables = environment(MASTER_PORT=str(free_port()), REQUEUED=str(folder / "requeued"), **slurm, **more)
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{variables['PATH']}"
    variables["VIRTUAL_ENV"] = sys.prefix
    command = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_slurm_on_two_nodes(world: TinyWorld, expected: list[float], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings_of(world, tmp_path / "run", deepspeed=ROOT / "scripts/zero2.json")))
    result = sbatch(tmp_path, [str(config)])
    assert result.returncode == 0, result.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-2)
    assert not (tmp_path / "requeued").exists()


def test_slurm_queues_a_stopped_run_again(tmp_path: Path) -> None:
    """Also where one rank has its checkpoint before the other: nobody ends the other."""
    result = sbatch(tmp_path, ["any.yaml"], STOPS, SIGNALLED="1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7"
    assert not list(tmp_path.glob(".stopped*"))


def test_slurm_does_not_queue_a_failed_run_again(tmp_path: Path) -> None:
    assert sbatch(tmp_path, ["any.yaml"], FAILS).returncode == 2
    assert not (tmp_path / "requeued").exists()


def test_the_command_for_a_hostfile() -> None:
    options = LaunchOptions(hostfile="hosts", master_port=1234)
    command = launch_command(["--deepspeed=zero2.json", "--output_dir=out"], options)
    assert command is not None
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[5:9] == ["--hostfile", "hosts", "--master_port", "1234"]
    assert "--num_gpus" not in command


def test_the_script_leaves_the_count_of_gpus_to_the_hostfile(tmp_path: Path) -> None:
    """It may be started from a machine without any."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\n")
    argv = script_flags("scripts/v1_5/finetune.sh", tmp_path, [], HOSTFILE=str(hosts))
    assert argv[2:4] == ["--hostfile", str(hosts)]
    assert "--num_gpus" not in argv
