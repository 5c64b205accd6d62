"""The formulas: products, element-wise work and bytes of the parts of a transformer, forward and backward.

Products are counted in multiply-adds; `OPERATIONS` says how many operations one is. Attention has no saving for the
causal mask or a sliding window, as torch's FLOP counter has none. Element-wise work (norms, softmax, activation
function, residual sums) is in the times, not in the FLOPs.

Shapes: B rows of a batch, n tokens of a row, D width, F intermediate width, H heads of d channels in K groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.cost.devices import Device, Precision
from llava.model.language_model.head_loss import CHUNKS

OPERATIONS = 2
"""Operations of a multiply-add, unless a caller says 1."""


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        inputs: channels that enter.
        outputs: channels that leave.
        trained: whether its weights learn.
    """

    inputs: int
    outputs: int
    trained: bool = False

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer of a transformer.

    Attributes:
        width: D.
        intermediate: F.
        heads: H.
        key_heads: K.
        head_width: d.
        gated: whether the activation function multiplies two halves.
    """

    width: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int
    gated: bool = True

    @classmethod
    def of(cls, config: Any, gated: bool = True) -> Widths:
        """Those of a config of a language model or an image encoder."""
        heads = config.num_attention_heads
        return cls(
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            gated=gated,
        )

    @property
    def queries(self) -> int:
        """Channels of the queries of a token, H d."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Channels of the keys of a token, K d."""
        return self.key_heads * self.head_width


@dataclass(frozen=True)
class Work:
    """One step of a computation.

    Attributes:
        macs: multiply-adds of products.
        other: element-wise operations.
        weights: weights that are read.
        read: activations and cached keys and values that are read.
        written: those that are written.
        times: how often it runs.
        in_layers: whether it is in the language model's layers, which a `Precision` is about.
    """

    macs: float = 0
    other: float = 0
    weights: float = 0
    read: float = 0
    written: float = 0
    times: float = 1
    in_layers: bool = False

    def bytes(self, precision: Precision) -> float:
        """What it moves between memory and units, once."""
        weight, value = (precision.weight, precision.value) if self.in_layers else (2, 2)
        return self.weights * weight + (self.read + self.written) * value

    def seconds(self, device: Device, precision: Precision) -> float:
        """The least time for all `times` (roofline): units at their peak or memory at its, whichever takes longer."""
        peak = precision.peak(device) if self.in_layers else device.peak_16
        return self.times * max((2 * self.macs + self.other) / peak, self.bytes(precision) / device.bandwidth)


def flops(works: Iterable[Work], operations: int = OPERATIONS) -> float:
    """Operations of the products."""
    return operations * sum(work.macs * work.times for work in works)


def seconds(works: Iterable[Work], device: Device, precision: Precision) -> float:
    """Sum of the least times of the steps."""
    return sum(work.seconds(device, precision) for work in works)


def moved_bytes(works: Iterable[Work], precision: Precision) -> float:
    """All that moves between memory and units."""
    return sum(work.times * work.bytes(precision) for work in works)


def written_bytes(works: Iterable[Work], precision: Precision) -> float:
    """All results that are written, as if none took the place of another."""
    return sum(work.times * work.written * (precision.value if work.in_layers else 2) for work in works)


def repeat(works: Iterable[Work], times: float, in_layers: bool = False) -> list[Work]:
    """The same steps so many times."""
    return [replace(work, times=work.times * times, in_layers=work.in_layers or in_layers) for work in works]


# Forward -----------------------------------------------------------------------------------------------------------


def linear(layer: Linear, rows: float) -> Work:
    """A linear layer on so many tokens."""
    return Work(
        macs=rows * layer.weights, weights=layer.weights, read=rows * layer.inputs, written=rows * layer.outputs
    )


def attention(widths: Widths, queries: float, keys: float, batch: float = 1, fused: bool = True) -> list[Work]:
    """Attention of `queries` tokens of each row to `keys` tokens; `fused`: scores never reach memory."""
    pairs = batch * widths.heads * queries * keys
    macs = pairs * widths.head_width
    asked, stored = batch * queries * widths.queries, batch * keys * widths.keys
    if fused:
        return [Work(macs=2 * macs, other=5 * pairs, read=asked + 2 * stored, written=asked)]
    return [
        Work(macs=macs, read=asked + stored, written=pairs),
        Work(other=5 * pairs, read=pairs, written=pairs),  # softmax: maximum, difference, power, sum, quotient
        Work(macs=macs, read=pairs + stored, written=asked),
    ]


def block(
    widths: Widths,
    linears: Sequence[Linear],
    queries: float,
    keys: float | None = None,
    batch: float = 1,
    fused: bool = True,
    fed: float | None = None,
) -> list[Work]:
    """One layer for `queries` new tokens of each row, which see `keys` tokens, themselves included (default: those).

    `fed` of them are left for the feed-forward layers, the ones after the first four (default: all).
    """
    rows, left = batch * queries, batch * (queries if fed is None else fed)
    inner = left * widths.intermediate
    activate = Work(other=2 * inner, read=(1 + widths.gated) * inner, written=inner)
    norms = [
        work
        for stream in (rows * widths.width, left * widths.width)
        for work in (
            Work(other=7 * stream, read=stream, written=stream),
            Work(other=stream, read=2 * stream, written=stream),
        )
    ]
    return [
        *(linear(layer, rows if fed is None or i < 4 else left) for i, layer in enumerate(linears)),
        *attention(widths, queries, queries if keys is None else keys, batch, fused),
        *norms,
        activate,
    ]


def ranking(widths: Widths, tokens: float, queries: float = 1, batch: float = 1) -> list[Work]:
    """What `attention_from_queries` computes to rank tokens: keys of all, the rows of the queries, their scores."""
    pairs = batch * widths.heads * queries * tokens
    return [
        linear(Linear(widths.width, widths.keys), batch * tokens),
        linear(Linear(widths.width, widths.queries), batch * queries),
        Work(macs=pairs * widths.head_width, other=5 * pairs, read=batch * tokens * widths.keys, written=pairs),
    ]


# Training ----------------------------------------------------------------------------------------------------------


def step_macs(layer: Linear, passes_back: bool) -> float:
    """Multiply-adds a token of a training step: as many for its input's gradient as forward, and for its weights'.

    Args:
        layer: whose weights learn or not.
        passes_back: whether weights before it learn.
    """
    return layer.weights * (1 + passes_back + layer.trained)


def step_macs_of(layers: Iterable[Linear], passes_back: bool) -> float:
    """The same of several layers that a token passes."""
    return sum(step_macs(layer, passes_back) for layer in layers)


def attention_macs(widths: Widths, squares: float) -> float:
    """Multiply-adds of attention forward, by the sum over rows of the square of their tokens; backward it is twice."""
    return 2 * squares * widths.queries


# Bytes -------------------------------------------------------------------------------------------------------------


def cache_bytes(widths: Widths, lengths: Iterable[float], value: float, batch: float = 1) -> float:
    """Keys and values of all layers, which hold `lengths` tokens of each row; `value`: bytes of a number."""
    return 2 * batch * widths.keys * value * sum(lengths)


def live_bytes(widths: Widths, rows: float, value: float, scores: float = 0) -> float:
    """The most that one layer holds at once in a prefill of so many tokens, beside weights and cache.

    That is the stream and its norm, and either queries, keys, values and the result of attention (with `scores`
    elements, twice, where it is not fused) or the intermediate results of the feed-forward layers.
    """
    attends = rows * (2 * widths.queries + 2 * widths.keys) + 2 * scores
    feeds = rows * widths.intermediate * (2 + widths.gated)
    return value * (2 * rows * widths.width + max(attends, feeds))


def activation_bytes(widths: Widths, lengths: Sequence[float], value: int, checkpointed: bool) -> float:
    """Activations that wait for the backward pass, for flash attention or sdpa.

    A layer keeps 8 D + 2 K d + 4 F numbers a token, and where `value` is 2 the norms' float32 copies, 4 D bytes.

    Args:
        widths: of the layers.
        lengths: tokens of all rows together that each layer sees.
        value: bytes of a number.
        checkpointed: keep only the layers' inputs, and all of one layer.
    """
    token = value * (8 * widths.width + 2 * widths.keys + 4 * widths.intermediate)
    token += 4 * widths.width * (value == 2)
    if checkpointed:
        return sum(lengths) * value * widths.width + max(lengths) * token
    return sum(lengths) * token


def logit_bytes(rows: float, vocabulary: int, value: int) -> float:
    """Logits of one chunk of so many tokens in training, of a large batch, with a copy and a gradient in float32."""
    return rows * vocabulary * (value + 8) / CHUNKS
