"""Compiles DeepSpeed's extension for ranks on the CPU, once, in the server process of `tests.ranks`.

It takes a minute. A compilation that is killed, as tests kill ranks, leaves a lock, for which all others wait without
end.
"""

import importlib
import importlib.util
import shutil

if importlib.util.find_spec("deepspeed") and shutil.which("g++"):
    importlib.import_module("deepspeed.comm.torch").build_shm_op()
