"""A run that goes on from a checkpoint goes on in its tracker too."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.files import atomic_folder

WANDB_FILE = "wandb_run_id"


@contextlib.contextmanager
def wandb_run(training: Any, checkpoint: str | None) -> Iterator[None]:
    """Inside, wandb opens the run that the checkpoint's start had opened, and without a checkpoint a new one.

    Its id stands in `output_dir`. A WANDB_RUN_ID of the user's has the last word.

    Args:
        training: arguments of the run.
        checkpoint: folder that it goes on from, or None.
    """
    if "wandb" not in training.report_to or training.process_index != 0 or "WANDB_RUN_ID" in os.environ:
        yield
        return
    file = Path(training.output_dir, WANDB_FILE)
    run_id = file.read_text(encoding="utf-8").strip() if checkpoint and file.is_file() else secrets.token_hex(4)
    with atomic_folder(file.parent) as folder:
        (folder / WANDB_FILE).write_text(run_id, encoding="utf-8")
    settings = {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]
