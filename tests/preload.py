"""What the server process of `tests.ranks` imports once, so that each run is a fork that starts at once."""

import gc
import importlib
import importlib.util
import shutil

for name in (
    "deepspeed.runtime.zero.muon.original_muon",  # torch.compile at import: all of inductor
    "llava.model.builder",
    "llava.train.train",
    "peft",
    "tests.tiny_world",
    "transformers.models.clip",
):
    importlib.import_module(name)

if importlib.util.find_spec("deepspeed") and shutil.which("g++"):
    # The extension for ranks on the CPU is compiled here (for a minute, once), where no test kills the process:
    # a compilation that is killed leaves a lock, for which all others would wait without end.
    importlib.import_module("deepspeed.comm.torch").build_shm_op()

gc.freeze()  # collections in the forks need not look through all of this
