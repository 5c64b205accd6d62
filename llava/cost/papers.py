"""The papers' figures of cost beside what the formulas give, and what must have been assumed where these differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llava.cost import published
from llava.cost.devices import PRECISIONS, Device
from llava.cost.formulas import Work, block, cache_bytes, flops, moved_bytes, repeat, seconds, written_bytes
from llava.cost.question import layer_works, methods
from llava.cost.sizes import Sizes, open_model
from llava.cost.tokens import layer_lengths, projector_passes

# What LLM-Viewer (github.com/hahnyuan/LLM-Viewer), which PruMerge and TRIM took their figures from, has for a V100.
VIEWER_V100 = Device("V100", 112e12, 62e12, 900e9, 32e9, has_bfloat16=False)


@dataclass(frozen=True)
class Figure:
    """A published figure and ours.

    Attributes:
        paper: its name.
        place: table, equation or section.
        what: it is of.
        unit: of it.
        published: as printed.
        computed: by the formulas, with what the paper states.
        assumed: other assumptions under which the formulas give `refitted`; empty where none are needed.
        refitted: see there.
    """

    paper: str
    place: str
    what: str
    unit: str
    published: float
    computed: float
    assumed: str = ""
    refitted: float | None = None

    @property
    def difference(self) -> float:
        """Of the computed figure from the published one, as a part of it."""
        return self.computed / self.published - 1

    @property
    def left(self) -> float | None:
        """The same of the refitted figure."""
        return None if self.refitted is None else self.refitted / self.published - 1


CONVENTIONS = {
    published.PYRAMIDDROP: "A multiply-add is one operation; the layers of Vicuna-7B on the image tokens alone, "
    "without head and rankings (equation 4).",
    published.STF: "A multiply-add is two operations; the layers of Vicuna-7B on the image tokens alone, without head.",
    published.PRUMERGE: "A multiply-add is two operations; roofline of a prefill on the V100 of LLM-Viewer "
    "(112 TFLOP/s, 62 TOP/s in 8 bits, 900 GB/s), eager attention, layers without head. Memory is all bytes that "
    "move, activations are all results that are written (keys and values are not). Stated: 576 or 40 image tokens and "
    "40 of text.",
    published.TRIM: "As PruMerge's, for 576 or 123 image tokens and 40 of text, Vicuna-7B in fp16. The cells of its "
    "Table 2 are not in the text that these figures were taken from; they are of section 5.1 and of the model's card.",
}


def figures() -> list[Figure]:
    """All of them, paper by paper."""
    return [*_pyramiddrop(), *_stf(), *_prumerge(), *_trim()]


def _pyramiddrop() -> Iterator[Figure]:
    sizes = Sizes.of(open_model("7b"))
    for place, tokens, method, value in published.PYRAMIDDROP_TFLOPS:
        reducers, _ = methods(method)
        lengths = layer_lengths(reducers.decoder, len(sizes.layers), [tokens], text=0)
        computed = flops(layer_works(sizes, [(n, n) for n in lengths]), operations=1) / 1e12
        yield Figure(published.PYRAMIDDROP, place, f"{_in_words(method)}, {tokens} tokens", "TFLOPs", value, computed)
    place, stages, keep, value = published.PYRAMIDDROP_SAVED
    saved = 100 * (1 - sum(keep**stage for stage in range(stages)) / stages)
    yield Figure(published.PYRAMIDDROP, place, f"saved, {stages} stages, lambda {keep}", "%", value, saved)


def _stf() -> Iterator[Figure]:
    model = open_model("7b")
    sizes = Sizes.of(model)
    for place, method, value in published.STF_TFLOPS:
        tokens, _ = projector_passes(model, methods(method)[0])
        computed = flops(layer_works(sizes, [(tokens, tokens)] * len(sizes.layers))) / 1e12
        yield Figure(published.STF, place, f"{_in_words(method)}, {tokens} tokens", "TFLOPs", value, computed)


def _in_words(method: str | None) -> str:
    """A method and its options without YAML's signs."""
    return "baseline" if method is None else method.strip("{}").removeprefix("name: ").replace("variant: paper, ", "")


# LLM-Viewer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prefill:
    """The layers of a language model on one prompt, as LLM-Viewer sees them."""

    model: str
    dtype: str
    tokens: int
    narrow: bool = False  # its activation function works on D channels, not on F

    def works(self) -> list[Work]:
        sizes = Sizes.of(open_model(self.model))
        widths = replace(sizes.widths, intermediate=sizes.widths.width) if self.narrow else sizes.widths
        layer = block(widths, sizes.layers[0], self.tokens, fused=False)
        return repeat(layer, len(sizes.layers), in_layers=True)

    def figures(self) -> tuple[float, float, float, float]:
        """TFLOPs, ms, GB that move and GB of results."""
        sizes, precision, works = Sizes.of(open_model(self.model)), PRECISIONS[self.dtype], self.works()
        cache = cache_bytes(sizes.widths, [self.tokens] * len(sizes.layers), precision.value)
        return (
            flops(works) / 1e12,
            1e3 * seconds(works, VIEWER_V100, precision),
            moved_bytes(works, precision) / 1e9,
            (written_bytes(works, precision) - cache) / 1e9,
        )


def _prumerge() -> Iterator[Figure]:
    units = (("FLOPs", "TFLOPs"), ("prefill", "ms"), ("memory", "GB"), ("activations", "GB"))
    for (model, dtype, merged), values in published.PRUMERGE_TABLE_2.items():
        stated, fitted = published.PRUMERGE_STATED[merged], published.PRUMERGE_FITTED[merged]
        ours = _Prefill(model, dtype, stated).figures()
        theirs = _Prefill(model, dtype, fitted, narrow=True).figures()
        for place, (name, unit) in enumerate(units):
            assumed, refitted = f"{fitted} tokens", theirs[place]
            if name == "FLOPs" and dtype == "int4":
                assumed, refitted = f"{assumed}; a quarter of fp16's", refitted / 4
            elif name != "FLOPs":
                assumed += "; activation function on D channels"
            if (model, dtype, merged, name) in published.PRUMERGE_ODD:
                assumed += f". Not met: {published.PRUMERGE_ODD[model, dtype, merged, name]}"
            what = f"{name}, {model.upper()} {dtype}{', PruMerge' if merged else ''}"
            yield Figure(published.PRUMERGE, "Table 2", what, unit, values[place], ours[place], assumed, refitted)


def _trim() -> Iterator[Figure]:
    counts = (*published.TRIM_STATED, published.TRIM_FITTED)
    before, after, fitted = (_Prefill("7b", "fp16", tokens).figures() for tokens in counts)
    assumed = f"{counts[2]} tokens with TRIM, not {counts[1]}; the text gives no reason for them"
    for (place, value), index, what in (
        (published.TRIM_FIRST_TOKEN, 1, "time of the first token, of that without TRIM"),
        (published.TRIM_MEMORY, 2, "memory, of that without TRIM"),
    ):
        ours, theirs = (100 * part[index] / before[index] for part in (after, fitted))
        yield Figure(published.TRIM, place, what, "%", value, ours, assumed, theirs)
