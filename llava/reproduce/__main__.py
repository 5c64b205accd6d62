"""`python -m llava.reproduce`, called by scripts/reproduce/common.sh; standard input lists the steps (`Plan.read`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava.cost.devices import find_device
from llava.messages import set_up_messages
from llava.reproduce.plan import Plan
from llava.reproduce.steps import KINDS


def main() -> int:
    """Show the plan, or run it."""
    parser = argparse.ArgumentParser(description="Show or run the steps of a reproduction.")
    parser.add_argument("--marks", type=Path, required=True, help="folder in which finished steps leave their command")
    parser.add_argument("--device", default="A100", help="that GPU hours are counted for")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of steps, between commas")
    parser.add_argument("--dry-run", action="store_true", help="show the steps and what they need; run nothing")
    flags = parser.parse_args()
    set_up_messages()

    def write(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    try:
        device = find_device(flags.device).name
        plan = Plan.read(sys.stdin, flags.marks, device, flags.only.split(","))
        if not flags.dry_run:
            return plan.run(write)
        plan.show(write, device)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
