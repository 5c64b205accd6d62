"""`run_info.json`: what a run was started with, so that its folder alone tells how to repeat it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llava.provenance import git_state, versions
from llava.train.settings.arguments import read_deepspeed_config
from llava.train.settings.parsing import Arguments, resolved

RUN_INFO_FILE = "run_info.json"


def run_info(arguments: Arguments, resumed_from: str | None) -> dict[str, Any]:
    """Settings with all defaults filled in, versions, commit, machine.

    Args:
        arguments: of the run; tokens for the hub are masked.
        resumed_from: checkpoint that it goes on from.
    """
    training = arguments.training
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "command": sys.argv,
        "config": resolved(arguments),
        "deepspeed": read_deepspeed_config(training.deepspeed) if training.deepspeed else None,
        "processes": training.world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parent),
    }


def write_run_info(arguments: Arguments, resumed_from: str | None, folder: Path) -> None:
    """Write `run_info.json` into a folder."""
    text = json.dumps(run_info(arguments, resumed_from), indent=2, default=str)
    (folder / RUN_INFO_FILE).write_text(text + "\n", encoding="utf-8")
