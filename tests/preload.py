"""What the server process of `tests.ranks` imports once, so that each run is a fork that starts at once."""

import gc
import importlib

for name in (
    "deepspeed.runtime.zero.muon.original_muon",  # torch.compile at import: all of inductor
    "llava.model.builder",
    "llava.train.train",
    "peft",
    "tests.tiny_world",
    "transformers.models.clip",
):
    importlib.import_module(name)

gc.freeze()  # collections in the forks need not look through all of this
