"""LLaVA's script of this name: `llava merge` under its flags."""

import argparse

from llava.train.merge import merge_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a LoRA folder and its base as one checkpoint.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base", default=None, help="default: the one that the adapter names")
    parser.add_argument("--save-model-path", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace what this program wrote there")
    args = parser.parse_args()
    try:
        merge_checkpoint(args.model_path, args.save_model_path, model_base=args.model_base, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
