"""LLaVA's entry for launchers: `deepspeed llava/train/train_mem.py --flag value ...`.

The name is LLaVA's: attention that saves memory. flash-attention is used where it is installed and a GPU is there,
otherwise torch's scaled dot product; `--attn_implementation` overrides.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
# In place of this folder, whose modules are not meant to be imported by their bare names.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from llava.train.launching.process import choose_accelerator, leave, run_and_report  # noqa: E402

if __name__ == "__main__":
    choose_accelerator()
    from llava.train.train import main

    leave(run_and_report(main, sys.argv[1:]))
