"""How often the host waits for the device in a training step, by method and attention.

    python -m benchmarks.waits

Counted, not timed: a tiny model runs on the CPU on a device that is not there (`tests/pretend_device.py`), forward and
backward with gradient checkpointing. The counts do not depend on sizes; the number of layers is that of the model, 6.
"""

from __future__ import annotations

from typing import Any

import pytest

from llava.model.language_model.packed import PACKED_SDPA, PACKED_VARLEN
from tests.test_staged import staged_model
from tests.test_waits import METHODS, collated, waits_of_a_step
from tests.varlen_kernels import put_loops, set_attention

SHOWN = (
    "none",
    "spatial",
    "stf",
    "prumerge at a budget",
    "prumerge",
    "fastv",
    "pyramiddrop",
    "prumerge and pyramiddrop",
)
WAYS = (("sdpa", False), ("flash_attention_2", False), (PACKED_SDPA, True), (PACKED_VARLEN, True))


def count(reduction: Any, attention: str, packed: bool) -> int:
    """Waits of a step."""
    model = staged_model(reduction=reduction)
    set_attention(model, attention)
    model.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    return len(waits_of_a_step(model, collated(), packed=packed))


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        put_loops(patch)
        print("| method | " + " | ".join(f"{name}, {'packed' if packed else 'padded'}" for name, packed in WAYS) + " |")
        print("|---" * (len(WAYS) + 1) + "|")
        for method in SHOWN:
            counts = [str(count(METHODS[method][0], *way)) for way in WAYS]
            print(f"| {method} | " + " | ".join(counts) + " |")


if __name__ == "__main__":
    main()
