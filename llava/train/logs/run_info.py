"""`run_info.json`: what a run was started with, so that its folder alone tells how to repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llava.train.settings.arguments import read_deepspeed_config
from llava.train.settings.parsing import Arguments, resolved

RUN_INFO_FILE = "run_info.json"
PACKAGES = (
    "llava",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "flash-attn",
    "bitsandbytes",
)


def run_info(arguments: Arguments, resumed_from: str | None) -> dict[str, Any]:
    """Settings with all defaults filled in, versions, commit, machine.

    Args:
        arguments: of the run; tokens for the hub are masked.
        resumed_from: checkpoint that it goes on from.
    """
    training = arguments.training
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "command": sys.argv,
        "config": resolved(arguments),
        "deepspeed": read_deepspeed_config(training.deepspeed) if training.deepspeed else None,
        "processes": training.world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **package_versions()},
        "git": git_state(Path(__file__).resolve().parent),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a run, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that `folder` lies in, and whether files in it differ; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_run_info(arguments: Arguments, resumed_from: str | None, folder: Path) -> None:
    """Write `run_info.json` into a folder."""
    text = json.dumps(run_info(arguments, resumed_from), indent=2, default=str)
    (folder / RUN_INFO_FILE).write_text(text + "\n", encoding="utf-8")
