"""The `llava` command; the modules in this folder hold its commands by what they are for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from llava.cli import checkpoints, costs, evaluation, training
from llava.messages import set_up_messages

app = typer.Typer(
    help="Train LLaVA-style models with fewer visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llava {version('llava')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show all that libraries say, and the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version
    if debug:
        os.environ["LLAVA_DEBUG"] = "1"
    set_up_messages()


COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "doctor": training.doctor,
    "cache-features": training.cache_features,
    "eval": evaluation.evaluate,
    "report": evaluation.report,
    "flops": costs.flops,
    "bench": costs.bench,
    "methods": costs.methods,
    "merge": checkpoints.merge,
    "convert": checkpoints.convert,
}
for _name, _function in COMMANDS.items():
    app.command(_name)(_function)


def main() -> None:
    """Entry point: what a user can mend is shown as one line, and the exit code is 2; 74 where the system refused."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        sys.exit(2 if isinstance(error, ValueError) else os.EX_IOERR)
