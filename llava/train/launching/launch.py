"""`llava train` and `llava cache-features`: start the processes of a run that a YAML file describes.

How it runs:
- Where a launcher has started this process already (torchrun, deepspeed, or Slurm with RANK and WORLD_SIZE set), or
  one process is enough and `deepspeed` is not set: in this process.
- With `deepspeed: FILE.json`: by DeepSpeed's launcher, as the shell scripts do, one process for each of `num_gpus`
  (default: all GPUs) on each machine of `hostfile` (default: this one).
- Otherwise, with more than one of `num_gpus`: by torchrun, on this machine.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path

import torch

from llava.train.launching.process import choose_accelerator, run_and_report
from llava.train.launching.supervise import supervise
from llava.train.settings.config import LaunchOptions, load_config
from llava.train.settings.parsing import check_args
from llava.train.settings.problems import Problems

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1]
ENTRY = FOLDER / "train_mem.py"


def train_from_config(path: str, overrides: list[str]) -> int:
    """Run the training that a YAML file and `key=value` overrides describe; see `run_from_config`."""
    return run_from_config(path, overrides, "train", ENTRY)


def cache_from_config(path: str, overrides: list[str]) -> int:
    """Cache the features of the training that they describe; see `run_from_config`."""
    return run_from_config(path, overrides, "cache_features", FOLDER / "cache_features.py")


def run_from_config(path: str, overrides: list[str], module: str, entry: Path) -> int:
    """Run a program on the settings that a YAML file and `key=value` overrides describe.

    Args:
        path: of the YAML file.
        overrides: `key=value`.
        module: of `llava.train`, whose `main` takes the flags.
        entry: the file that a launcher starts for it.

    Returns:
        The exit code of the run.

    Raises:
        ValueError: settings that do not fit, before any process is started.
    """
    problems = Problems()
    flags, options = load_config(path, overrides, problems)
    choose_accelerator()
    problems.check(check_args, flags)
    problems.raise_all()
    command = None if "RANK" in os.environ else launch_command(flags, options, entry)
    if command is None:
        return run_and_report(import_module(f"llava.train.{module}").main, flags)
    logger.debug("starting %s", " ".join(command))
    return supervise(command, _environment(options))


def launch_command(flags: list[str], options: LaunchOptions, entry: Path = ENTRY) -> list[str] | None:
    """The command that starts all processes, or None where this process is enough.

    Args:
        flags: of the run.
        options: how many processes, and where.
        entry: the file that they run.
    """
    processes = options.num_gpus or max(1, torch.cuda.device_count())
    port = [] if options.master_port is None else ["--master_port", str(options.master_port)]
    if any(flag.startswith("--deepspeed=") for flag in flags):
        machines = ["--hostfile", options.hostfile] if options.hostfile else []
        count = ["--num_gpus", str(processes)] if options.num_gpus or not machines else []
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
        return [*launcher, *machines, *count, *port, str(entry), *flags]
    if options.hostfile:
        raise ValueError("hostfile is read by DeepSpeed's launcher: set deepspeed too, e.g. ./scripts/zero2.json")
    if processes == 1:
        return None
    launcher = [sys.executable, "-m", "llava.train.launching.torchrun", "--nproc_per_node", str(processes)]
    return [*launcher, *port, str(entry), *flags]


def _environment(options: LaunchOptions) -> dict[str, str]:
    """Without a GPU the processes share the cores, where each would take all."""
    environment = dict(os.environ)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        threads = max(1, (os.cpu_count() or 1) // (options.num_gpus or 1))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment
