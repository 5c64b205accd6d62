"""Train the toy models that lie in playground/toy/models: a CLIP and a Vicuna, small enough for a repository.

    python playground/toy/make_models.py [--only clip|vicuna] [--output DIR]

The quickstart does not run this; it starts from the trained files, as LLaVA starts from the published ones. The
same arguments give the same models on the same machine and library versions. It takes about half an hour on two
CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from make_clip import make_clip
from make_vicuna import make_vicuna

OUTPUT = Path(__file__).resolve().parent / "models"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy vision tower and the toy language model.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--only", choices=("clip", "vicuna"), default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clip-steps", type=int, default=1600)
    parser.add_argument("--vicuna-steps", type=int, default=4000)
    flags = parser.parse_args()
    if flags.only != "vicuna":
        make_clip(flags.output / "clip", flags.seed, flags.clip_steps)
    if flags.only != "clip":
        make_vicuna(flags.output / "vicuna", flags.seed, flags.vicuna_steps)


if __name__ == "__main__":
    main()
