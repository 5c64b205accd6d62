"""Ask the held-out questions of every stage of the quickstart and print what was measured.

python playground/toy/report.py --base LLM --vision-tower CLIP --pretrained DIR --lora DIR --data DIR --output DIR
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llava.eval.accuracy import Score, accuracy_table, score_files
from llava.eval.answering import VqaOptions
from llava.eval.running import Evaluation, default_devices, run_tasks
from llava.eval.sharding import Source
from llava.messages import set_up_messages


@dataclass(frozen=True)
class Row:
    """One row of the table: the checkpoint's own reduction, or in its place `reduction`; with images or not."""

    name: str
    reduction: str | None = None
    no_images: bool = False


STAGES = {
    "pretrained": (
        Row("language model alone, no image", no_images=True),
        Row("projector pretrained"),
    ),
    "lora": (
        Row("LoRA with PruMerge"),
        Row("LoRA, asked with all tokens", reduction="none"),
        Row("LoRA, asked without the image", no_images=True),
    ),
}


def ask_stage(folder: Path, rows: tuple[Row, ...], flags: argparse.Namespace) -> dict[str, Score]:
    """Scores of one checkpoint, by the names of the rows; each is a run that `llava report` reads too."""
    scores = {}
    for row in rows:
        source = Source(
            model_path=str(folder),
            model_base=str(flags.base),
            vision_tower=str(flags.vision_tower),
            reduction=row.reduction,
            dtype=torch.float32,
        )
        run = flags.output / row.name.replace(",", "").replace(" ", "-")
        options = VqaOptions(temperature=0, batch_size=50, count_visual_tokens=True, no_images=row.no_images)
        run_tasks(
            Evaluation(
                source=source,
                tasks=["toy"],
                output=run,
                data=flags.data.parent,
                options=options,
                devices=default_devices(1),
                overwrite=True,
            )
        )
        scores[row.name] = score_files(flags.data / "heldout.jsonl", run / "toy" / "answers.jsonl")
    return scores


def losses(folder: Path) -> list[float]:
    """The losses that a stage logged, in order."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def loss_table(stages: dict[str, Path], average: int = 10) -> Table:
    """Mean loss of the first and the last steps of each stage."""
    table = Table(title=f"training loss, mean of {average} steps")
    for name in ("stage", "steps", "at the start", "at the end"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, folder in stages.items():
        values = losses(folder)
        first, last = values[:average], values[-average:]
        ends = (f"{sum(part) / len(part):.3f}" for part in (first, last))
        table.add_row(name, str(len(values)), *ends)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the quickstart's results.")
    for name in ("base", "vision-tower", "pretrained", "lora", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    flags = parser.parse_args()
    if flags.data.name != "toy":
        parser.error(f"--data {flags.data}: the folder of the toy's data is called toy")
    set_up_messages(logging.WARNING)
    scores: dict[str, Score] = {}
    for stage, rows in STAGES.items():
        scores |= ask_stage(getattr(flags, stage), rows, flags)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(loss_table({"projector": flags.pretrained, "LoRA + PruMerge": flags.lora}))
    asked = sum(next(iter(scores.values())).asked.values())
    console.print(accuracy_table(scores, f"{asked} held-out questions: visual tokens an image, accuracy in %"))


if __name__ == "__main__":
    main()
