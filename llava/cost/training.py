"""What training costs: FLOPs of a step, memory of a device, hours of a recipe.

Memory of one device, with P weights in all, T of them trained, W devices, b samples a device, L tokens a sample, D, F
and V the language model's width, intermediate width and vocabulary, K d the channels of its keys, e bytes of an
activation (2, or 4 in float32), in bytes:

- weights: P x (2 or 4; bits / 8 of a quantized language model); / W with ZeRO-3. Without DeepSpeed, in 16 bits, 2 T
  more for the copies that autocast makes
- gradients: T x (2 with DeepSpeed in 16 bits, otherwise 4); / W with ZeRO-2 and 3
- optimizer: T x (8 for Adam's moments + 4 for DeepSpeed's float32 copy); / W with ZeRO-1 to 3
- activations of a layer: b L (e (8 D + 2 K d + 4 F) + 4 D for the norms' float32 copies where e is 2), for flash
  attention or sdpa; all layers at once, or with gradient checkpointing one layer and the inputs of all, b L e D each
- logits: b L (e V + 8 V) / 8, for a copy and a gradient in float32 where all tokens are learnt: the head sees one
  chunk of 8 at a time

Not known here: the allocator's gaps, communication buffers, the CUDA context, activations of a trained vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from llava.cost.devices import find_device
from llava.cost.formulas import (
    OPERATIONS,
    Linear,
    activation_bytes,
    attention_macs,
    flops,
    logit_bytes,
    step_macs,
    step_macs_of,
)
from llava.cost.question import (
    entering_tokens,
    layer_works,
    methods,
    ranking_works,
    reducing,
    tiles_of,
    vision_works,
    weights_with,
)
from llava.cost.sizes import Sizes, open_model
from llava.cost.tokens import layer_lengths, tower_lengths
from llava.model.language_model.head_loss import chunk_count

GIB = 2**30
TRAINS = ("all", "lora", "projector")
TRAINING_PARTS = ("vision", "reducer", "projector", "layers", "head", "recomputation")


@dataclass(frozen=True)
class TrainingRun:
    """A training run on mixed precision with DeepSpeed and Adam.

    Attributes:
        batch: samples of a device's forward pass.
        images: of a sample.
        tiles: of an image, whose tokens all enter; None: as the model's settings cut and lay out an image.
        image_size: (width, height) in pixels, for anyres.
        text_tokens: of a sample beside its images.
        answers: turns of a sample whose answers are learnt.
        head_rows: tokens of a sample that are learnt, which the head runs on; None: all its text.
        trains: "all" (projector and language model), "lora" (projector and adapters) or "projector".
        lora_rank: of the adapters on all linear layers of the language model.
        trains_tower: whether the vision tower learns too.
        checkpointing: whether the layers are computed again in the backward pass, as most logits always are.
        devices: that share optimizer states, gradients and weights.
        zero_stage: what of these they share.
        device: a name of `llava.cost.devices.DEVICES`.
        utilization: the part of the device's peak that the run reaches (MFU).
        image_tokens: visual tokens of a sample, in place of what the method's budget says.
        fused: see `Scenario`.
    """

    batch: int = 16
    images: int = 1
    tiles: int | None = None
    image_size: tuple[int, int] | None = None
    text_tokens: int = 300
    answers: int = 1
    head_rows: int | None = None
    trains: str = "all"
    lora_rank: int = 128
    trains_tower: bool = False
    checkpointing: bool = True
    devices: int = 8
    zero_stage: int = 2
    device: str = "A100"
    utilization: float = 0.3
    image_tokens: float | None = None
    fused: bool = True

    def __post_init__(self) -> None:
        find_device(self.device)
        if self.trains not in TRAINS:
            raise ValueError(f"trains={self.trains!r}: choose one of {', '.join(TRAINS)}")
        if self.zero_stage not in range(4):
            raise ValueError(f"zero_stage={self.zero_stage}: choose one of 0, 1, 2, 3")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization}: expected above 0 and at most 1")
        least = {"batch": 1, "images": 0, "tiles": 1, "text_tokens": 1, "answers": 1, "lora_rank": 1, "devices": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value}: expected {bound} or more")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def describe(self) -> str:
        """The total and its parts in GiB."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.2f}" for field in fields(self))
        return f"{self.total / GIB:.2f} GiB ({parts})"


@dataclass(frozen=True)
class TrainingCost:
    """What a step of one device costs.

    Attributes:
        macs: multiply-adds of each of `TRAINING_PARTS`.
        image_tokens: visual tokens of a sample that enter the language model.
        lengths: tokens of a sample that each layer sees.
        memory: of a device.
        run: what it is the cost of.
        note: what stands for an adaptive method.
    """

    macs: dict[str, float]
    image_tokens: float
    lengths: list[int]
    memory: MemoryEstimate
    run: TrainingRun
    note: str = ""

    def flops(self, operations: int = OPERATIONS) -> dict[str, float]:
        """Operations of each part; a multiply-add is `operations` of them."""
        return {name: operations * macs for name, macs in self.macs.items()}

    @property
    def seconds(self) -> float:
        """A step's time at the run's utilization, which counts no recomputation."""
        needed = sum(macs for name, macs in self.macs.items() if name != "recomputation")
        return 2 * needed / (self.run.utilization * find_device(self.run.device).peak_16)


def training_cost(model: Any, reduction: Any = None, run: TrainingRun | None = None) -> TrainingCost:
    """What a training step costs with a method.

    Args:
        model: from `open_model`, or a LLaVA model on any device; what learns is the run's to say.
        reduction: what `ReductionConfig.parse` reads; None: no method.
        run: see there.

    Raises:
        ValueError: a method that does not suit the model, or is adaptive without a typical count.
    """
    run = run or TrainingRun()
    sizes = Sizes.of(model).with_training(run.trains, run.lora_rank, run.trains_tower)
    tiles, share = tiles_of(model, run)
    reducers, note = methods(reduction, share, model)
    images = entering_tokens(model, reducers, run)
    lengths = layer_lengths(reducers.decoder, len(sizes.layers), images, run.text_tokens)
    b, rows = run.batch, run.text_tokens if run.head_rows is None else run.head_rows
    reduced, passes = reducing(model, sizes, reducers, tiles, run)
    ranked = ranking_works(sizes, reducers.decoder, lengths, b, run.answers)
    macs = {
        "vision": tower_step_macs(sizes, tower_lengths(model, reducers), tiles),
        "reducer": flops([*reduced, *ranked], 1),
        "projector": projector_step_macs(passes, after=run.trains_tower),
        "layers": sum(layer_step_macs(sizes, i, b * n, b * n * n) for i, n in enumerate(lengths)),
        "head": b * rows * step_macs(sizes.head, passes_back=True),
        "recomputation": b * rows * sizes.head.weights * (1 - 1 / chunk_count(b * rows, sizes.head.outputs)),
    }
    if run.checkpointing:
        macs["recomputation"] += _recomputed(sizes, lengths, b)
    weights = weights_with(model, sizes, reducers)
    memory = _memory(sizes, weights, [b * n for n in lengths], b * rows, run)
    return TrainingCost(macs, sum(images), lengths, memory, run, note)


def _recomputed(sizes: Sizes, lengths: Sequence[int], batch: int) -> float:
    """Multiply-adds of the layers once more; torch stops before each layer's last product, whose result none needs."""
    forward = flops(layer_works(sizes, [(n, n) for n in lengths], batch), 1)
    return forward - sum(batch * n * layer[-1].weights for n, layer in zip(lengths, sizes.layers, strict=True))


def tower_step_macs(sizes: Sizes, lengths: Sequence[tuple[int, int]], tiles: float) -> float:
    """Multiply-adds of the vision tower in a training step, backward too where its blocks learn."""
    forward = flops(vision_works(sizes, lengths, tiles), 1)
    if not any(layer.trained for block in sizes.blocks[: len(lengths)] for layer in block):
        return forward
    return 3 * forward - tiles * sizes.patches * sizes.patch_embedding.weights  # pixels have no gradient


def layer_step_macs(sizes: Sizes, layer: int, rows: float, squares: float) -> float:
    """Multiply-adds of one layer of the language model, forward and backward.

    Args:
        sizes: of the model.
        layer: its number.
        rows: tokens of all samples.
        squares: sum over samples of the square of their tokens.
    """
    return rows * step_macs_of(sizes.layers[layer], passes_back=True) + 3 * attention_macs(sizes.widths, squares)


def projector_step_macs(passes: Sequence[tuple[Linear, float]], trained: bool = True, after: bool = False) -> float:
    """Multiply-adds of the projector in a training step.

    Args:
        passes: its linear layers in their order, with the rows that each sees.
        trained: whether it learns.
        after: whether what comes before it learns too.
    """
    if not passes:
        return 0
    first, *others = passes
    macs = first[1] * step_macs(replace(first[0], trained=trained), passes_back=after)
    return macs + sum(rows * step_macs(replace(layer, trained=trained), trained or after) for layer, rows in others)


# Memory ----------------------------------------------------------------------------------------------------------


def state_bytes(
    trained: float, frozen_bytes: float, trained_bytes: float, state: float, stage: int, devices: int, copies: float = 0
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states of one device; the formulas stand at the top of this file.

    Args:
        trained: number of trained weights.
        frozen_bytes: of all frozen weights.
        trained_bytes: of a trained weight and of its gradient.
        state: bytes of an optimizer for each trained weight.
        stage: of ZeRO.
        devices: that share them.
        copies: bytes of each trained weight besides.
    """
    weights = frozen_bytes + trained * (trained_bytes + copies)
    shares = [devices if stage >= least else 1 for least in (3, 2, 1)]
    parts = (weights, trained * trained_bytes, trained * state)
    return (parts[0] / shares[0], parts[1] / shares[1], parts[2] / shares[2])


def _memory(
    sizes: Sizes, weights: Mapping[str, int], seen: list[int], head_rows: int, run: TrainingRun
) -> MemoryEstimate:
    """In 16 bits, with DeepSpeed's Adam: 12 bytes of states for each trained weight."""
    adapters = sum(layer.weights for layers in sizes.layers for layer in layers if layer.trained)
    learns = {"projector": weights["projector"], "lora": weights["projector"] + adapters}
    learns["all"] = sum(weights[part] for part in ("projector", "layers", "head", "embeddings"))
    trained = learns[run.trains] + run.trains_tower * weights["tower"]
    total = sum(weights.values()) + (adapters if run.trains == "lora" else 0)
    states = state_bytes(trained, 2 * (total - trained), 2, 12, run.zero_stage, run.devices)
    activations = activation_bytes(sizes.widths, seen, 2, run.checkpointing)
    return MemoryEstimate(*states, activations, logit_bytes(head_rows, sizes.head.outputs, 2))


# A recipe --------------------------------------------------------------------------------------------------------


def gpu_hours(
    samples: float,
    reduction: Any = None,
    *,
    model: Any = "llava-1.5-7b",
    tokens: float | None = None,
    text_tokens: int = 300,
    trains: str = "all",
    trains_tower: bool = False,
    device: str = "A100",
    utilization: float = 0.3,
    epochs: float = 1,
) -> float:
    """Hours of one device for a training recipe: divide by the number of devices for the time of a run.

    Args:
        samples: of the data.
        reduction: the method, in any form that `ReductionConfig.parse` reads.
        model: what `open_model` reads.
        tokens: visual tokens of a sample that enter the language model, in place of what the method's budget says.
        text_tokens: of a sample beside its images, a mean.
        trains: "all", "lora" or "projector".
        trains_tower: whether the vision tower learns too.
        device: a name of `llava.cost.devices.DEVICES`.
        utilization: the part of the device's peak that is reached (MFU): the products that a step needs, recomputation
            left out, over the peak. With gradient checkpointing 0.3 is usual.
        epochs: over the data.

    Raises:
        ValueError: an unknown model, method or device.
    """
    run = TrainingRun(
        batch=1,
        text_tokens=text_tokens,
        trains=trains,
        trains_tower=trains_tower,
        device=device,
        utilization=utilization,
        image_tokens=tokens,
    )
    opened = model if hasattr(model, "get_model") else open_model(model)
    return samples * epochs * training_cost(opened, reduction, run).seconds / 3600
