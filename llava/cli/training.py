"""Commands that train, and prepare it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; its keys are the flags of train_mem.py.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. learning_rate=2e-5 reduction=prumerge num_gpus=2")
    ] = None,
) -> None:
    """Train, as a YAML file says: `llava train configs/prumerge/finetune_lora.yaml output_dir=out num_gpus=8`.

    Besides the flags, the keys num_gpus, hostfile and master_port say how to launch. With `deepspeed` set,
    DeepSpeed's launcher starts one process for each GPU, as the shell scripts do; otherwise torchrun does where
    num_gpus is above 1. In a process that a launcher has started (RANK is set), the training runs right there.
    """
    from llava.train.launching.launch import train_from_config
    from llava.train.launching.process import leave

    leave(train_from_config(str(config), overrides or []))


def doctor(
    config: Annotated[Path, typer.Argument(help="YAML file, as for `llava train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `llava train`.")] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU to compare with, where the run goes to another machine.")
    ] = None,
) -> None:
    """Check a run without training: settings, every sample and image, lengths, checkpoints, memory and disk.

    Prints a line for each finding, and ends with exit code 1 where something must be mended.
    """
    from llava.train.preflight.doctor import examine, summary

    report = examine(config, overrides or [], device_memory)
    for finding in report.ordered():
        typer.echo(finding.line())
    typer.echo(summary(report))
    raise typer.Exit(1 if report.errors else 0)


def cache_features(
    config: Annotated[Path, typer.Argument(help="YAML file, as for `llava train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for `llava train`; feature_cache=FOLDER says where to.")
    ] = None,
) -> None:
    """Run the frozen vision tower once over all images of a run, which then reads its features in place of them.

    What is there already is kept, so a command that was killed goes on. `llava train` with the same settings reads
    the folder; docs/training.md says when that is right, and what it saves.
    """
    from llava.train.launching.launch import cache_from_config
    from llava.train.launching.process import leave

    leave(cache_from_config(str(config), overrides or []))
