"""A run's log as JSON lines in its output folder."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava.train.checkpoints.folders import write_errors_named

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends each line of log to `metrics.jsonl`: a JSON object with `step` and `time` (seconds since 1970).

    When a run goes on from a checkpoint, lines of later steps are dropped, so each step stands there once; so is a line
    that a killed run wrote half, and the summary of an earlier end. NaN and infinity: see `strict_json`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what the run is about to write again."""
        file = Path(args.output_dir, METRICS_FILE)
        if state.is_world_process_zero and file.exists():
            with write_errors_named(file, args.output_dir):
                drop_later_lines(file, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line."""
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir, METRICS_FILE)
        record = {"step": state.global_step, "time": round(time.time(), 3), **(logs or {})}
        line = json.dumps(strict_json(record)) + "\n"
        with write_errors_named(file, args.output_dir):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(line)


def drop_later_lines(file: Path, step: int) -> None:
    """Keep the lines of steps up to `step`, without summaries (`train_runtime`) and what is not whole."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, step)]
    if kept != lines:
        new = file.with_name(f".{file.name}-{os.getpid()}")
        new.write_text("".join(kept), encoding="utf-8")
        new.replace(file)


def _is_kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    is_whole = line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return is_whole and record["step"] <= step and "train_runtime" not in record


def strict_json(record: dict[str, Any]) -> dict[str, Any]:
    """A record with null for each NaN and infinity, which JSON does not have; `not_finite` says which it was."""
    odd = {key: str(value) for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**record, **dict.fromkeys(odd), **({"not_finite": odd} if odd else {})}
