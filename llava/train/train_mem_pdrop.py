"""PyramidDrop's name of `train_mem.py`; `--layer_list` and `--image_token_ratio_list` say what is dropped."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("train_mem.py")), run_name="__main__")
