"""Memory of one device, and disk, that a run will need: an estimate by the formulas of `llava.cost.training`.

What DeepSpeed's config offloads to the host is not counted, nor are the activations of a vision tower that is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.trainer_utils import SaveStrategy

from llava.cost import formulas
from llava.cost.training import GIB, MemoryEstimate, state_bytes
from llava.train.checkpoints.saving import RunKind, part_of
from llava.train.modeling import compute_dtype, loading_dtype, run_kind
from llava.train.preflight.findings import ERROR, NOTE, WARNING, Report
from llava.train.settings.arguments import read_deepspeed_config, zero_stage
from llava.train.settings.parsing import Arguments

SLACK = 0.9
"""Part of a device's memory above which an estimate is a warning."""


def estimate_memory(model: Any, arguments: Arguments, world_size: int, length: int) -> MemoryEstimate:
    """Memory of one device in training.

    Args:
        model: on any device, with `requires_grad` as in training.
        arguments: of the run.
        world_size: number of devices.
        length: tokens of a sample.
    """
    training = arguments.training
    deepspeed = read_deepspeed_config(training.deepspeed) if training.deepspeed else {}
    zero = deepspeed.get("zero_optimization", {})
    stage = zero_stage(training.deepspeed)
    trained = _count(model, lambda name, weight: weight.requires_grad)
    frozen = _count(model, lambda name, weight: not weight.requires_grad)
    quantized = _count(model, lambda name, weight: not weight.requires_grad and part_of(name) == "language_model")
    trained_bytes = compute_dtype(training).itemsize if training.deepspeed else 4
    frozen_bytes = loading_dtype(arguments).itemsize
    frozen_total = float(frozen * frozen_bytes)
    if training.bits != 16:
        frozen_total -= quantized * (frozen_bytes - training.bits / 8)
    copies = 0 if training.deepspeed else 4 - compute_dtype(training).itemsize
    moments, masters = optimizer_bytes(training)
    weights, gradients, optimizer = state_bytes(
        trained, frozen_total, trained_bytes, moments + masters, stage, world_size, copies
    )
    activations, logits = activation_bytes(model, training, length)
    return MemoryEstimate(
        weights=0 if _offloaded(zero, "offload_param") else weights,
        gradients=gradients,
        optimizer=0 if _offloaded(zero, "offload_optimizer") else optimizer,
        activations=activations,
        logits=logits,
    )


def _count(model: Any, chosen: Callable[[str, torch.Tensor], bool]) -> int:
    """Elements of the chosen weights."""
    return sum(weight.numel() for name, weight in model.named_parameters() if chosen(name, weight))


def _offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def optimizer_bytes(training: Any) -> tuple[int, int]:
    """Bytes for each trained weight: an optimizer's moments, and DeepSpeed's float32 copy."""
    name = str(training.optim)
    if name.startswith(("sgd", "adafactor")):
        moments = 0  # Adafactor's rows and columns are negligible
    else:
        moments = 2 if "8bit" in name else 8
    return moments, 4 if training.deepspeed and (training.bf16 or training.fp16) else 0


def activation_bytes(model: Any, training: Any, length: int) -> tuple[float, float]:
    """Bytes of the activations that wait for the backward pass, and of the logits.

    Args:
        model: with the language model's config.
        training: with the batch size, precision and gradient checkpointing of the run.
        length: tokens of a sample.
    """
    config, size = model.config, compute_dtype(training).itemsize
    tokens = getattr(training, "tokens_per_batch", 0) or training.per_device_train_batch_size * length
    checkpointed = bool(training.gradient_checkpointing or getattr(training, "activation_checkpointing", None))
    seen = [tokens] * config.num_hidden_layers
    activations = formulas.activation_bytes(formulas.Widths.of(config), seen, size, checkpointed)
    return activations, formulas.logit_bytes(tokens, config.vocab_size, size)


def check_memory(report: Report, need: MemoryEstimate, device_bytes: int | None) -> None:
    """Compare an estimate with the devices.

    Args:
        report: gets the findings.
        need: of one device.
        device_bytes: of the smallest one; None where there is none here, so that nothing is compared.
    """
    text = f"about {need.describe()} on each device"
    if device_bytes is None:
        report.add("memory", f"{text}; there is no GPU here to compare with, --device-memory gives its GiB", NOTE)
        return
    given = f"of {device_bytes / GIB:.1f} GiB"
    if need.total > device_bytes:
        mend = "use a higher ZeRO stage, a smaller per_device_train_batch_size, gradient_checkpointing or more devices"
        report.add("memory", f"{text} {given}: {mend}", ERROR)
    else:
        report.add("memory", f"{text} {given}", WARNING if need.total > SLACK * device_bytes else NOTE)


def device_memory(use_cpu: bool, processes: int) -> int | None:
    """Bytes of the smallest device here: a GPU, or a process's share of this machine's memory; None without a GPU."""
    if use_cpu:
        return int(psutil.virtual_memory().total / processes)
    if not torch.cuda.is_available():
        return None
    devices = range(torch.cuda.device_count())
    return int(min(torch.cuda.get_device_properties(device).total_memory for device in devices))


# Disk ------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(model: Any, arguments: Arguments) -> tuple[float, float]:
    """Bytes of what a run writes at its end, and of what a checkpoint holds beside it for resuming."""
    training = arguments.training
    trained = _count(model, lambda name, weight: weight.requires_grad)
    frozen = _count(model, lambda name, weight: not weight.requires_grad)
    full = run_kind(arguments) is RunKind.FULL
    trained_bytes = compute_dtype(training).itemsize if training.deepspeed else 4
    weights = trained * trained_bytes + (frozen * loading_dtype(arguments).itemsize if full else 0)
    moments, copies = optimizer_bytes(training)
    # DeepSpeed writes the weights once more, with its own state.
    return weights, trained * (moments + copies) + (weights if training.deepspeed else 0)


def checkpoints_kept(training: Any, samples: int, world_size: int) -> int:
    """How many checkpoints lie in the output folder at most, the one that is being written included."""
    strategy = SaveStrategy(training.save_strategy)
    if strategy is SaveStrategy.NO:
        return 0
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    steps = training.max_steps if training.max_steps > 0 else int(samples * training.num_train_epochs / batch)
    if strategy is SaveStrategy.EPOCH:
        written = max(1, int(training.num_train_epochs))
    else:
        every = training.save_steps if training.save_steps >= 1 else max(1, steps * training.save_steps)
        written = int(steps // every)
    limit = training.save_total_limit
    return written if limit is None else min(written, limit + 1)


def check_disk(
    report: Report, model: Any, arguments: Arguments, samples: int, world_size: int, free: int | None = None
) -> None:
    """Compare the free disk with all checkpoints that will lie there, and the result.

    Args:
        report: gets the findings.
        model: with `requires_grad` as in training.
        arguments: of the run.
        samples: of the data; 0 for a stream.
        world_size: number of devices.
        free: bytes; default: those of the disk of `output_dir`, and what a run that is resumed has written there.
    """
    folder = Path(arguments.training.output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if free is None:
        free = shutil.disk_usage(existing).free + _bytes_in(folder)
    weights, state = checkpoint_bytes(model, arguments)
    kept = checkpoints_kept(arguments.training, samples, world_size)
    need = weights + kept * (weights + state)
    text = (
        f"{need / GIB:.2f} GiB for {kept} checkpoints of {(weights + state) / GIB:.2f} GiB and the result, "
        f"{free / GIB:.1f} GiB free for it in {existing}"
    )
    if need > free:
        report.add("disk", f"{text}: set a smaller --save_total_limit, a larger --save_steps or another --output_dir")
    else:
        report.add("disk", text, NOTE)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
