"""LLaVA's script of this name: write the projector of a full checkpoint to a file, for `--pretrain_mm_mlp_adapter`."""

import argparse
from pathlib import Path

from llava.train.checkpoints.saving import extract_projector

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the projector of a full checkpoint to a file.")
    parser.add_argument("--model-path", "--model_name_or_path", required=True, help="the checkpoint's folder")
    parser.add_argument("--output", required=True, help="the file, such as mm_projector.bin")
    args = parser.parse_args()
    try:
        extract_projector(Path(args.model_path), Path(args.output))
    except ValueError as error:
        parser.error(str(error))
