"""What dropping image tokens inside the language model saves: time against FLOPs, and the KV cache against its formula.

    python benchmarks/decoder_reducers.py [--image-tokens 576 2880] [--train] [--repeats 5]
    python benchmarks/decoder_reducers.py --width 4096 --intermediate 11008 --heads 32 --device cuda \\
        --attention flash_attention_2 --batch 8

A Llama with random weights and a small vocabulary, so that the layers are what is timed. The baseline and each method
run by turns in one run; the time ratio is the median over the turns, to be compared with the ratio of FLOPs of the
layers (`llava.cost`). A training step is a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from llava.constants import IGNORE_INDEX
from llava.cost.formulas import Widths, block, cache_bytes, flops
from llava.cost.sizes import linears_of
from llava.model.language_model.families import LlavaLlamaConfig, LlavaLlamaForCausalLM

METHODS = {name: {"name": name} for name in ("pyramiddrop", "fastv", "sparsevlm")}
TEXT_BEFORE, TEXT_AFTER = 35, 25  # a system prompt, a question


def build_model(args: argparse.Namespace) -> Any:
    """A Llama in LLaVA's class, without a vision tower."""
    config = LlavaLlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        vocab_size=1024,
        attn_implementation=args.attention,
    )
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = LlavaLlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def make_batch(args: argparse.Namespace, image_tokens: int, model: Any) -> dict[str, torch.Tensor]:
    """Embeddings of text, one image and text; learnt is the last half of the text."""
    length = TEXT_BEFORE + image_tokens + TEXT_AFTER
    shape = (args.batch, length)
    image_index = torch.full(shape, -1, device=model.device)
    image_index[:, TEXT_BEFORE : TEXT_BEFORE + image_tokens] = torch.arange(args.batch, device=model.device)[:, None]
    batch = {
        "inputs_embeds": torch.randn(*shape, args.width, device=model.device, dtype=model.dtype),
        "attention_mask": torch.ones(shape, dtype=torch.long, device=model.device),
        "image_index": image_index,
    }
    if args.train:
        labels = torch.randint(0, 1024, shape, device=model.device)
        labels[:, : -TEXT_AFTER // 2] = IGNORE_INDEX
        batch["labels"] = labels
    return batch


def layer_lengths(model: Any, image_tokens: int) -> list[int]:
    """Tokens that each layer sees."""
    reducer, layers = model.get_model().decoder_reducer, len(model.get_model().layers)
    counts = [image_tokens] * layers if reducer is None else reducer.layer_counts(layers, image_tokens)
    return [count + TEXT_BEFORE + TEXT_AFTER for count in counts]


def layer_flops(model: Any, lengths: list[int]) -> float:
    """Of all layers, which see so many tokens."""
    widths, layers = Widths.of(model.config), model.get_model().layers
    return flops(work for n, layer in zip(lengths, layers, strict=True) for work in block(widths, linears_of(layer), n))


def step(model: Any, batch: dict[str, torch.Tensor], train: bool) -> int | None:
    """One prefill, whose cache's bytes are returned, or one training step."""
    if not train:
        with torch.no_grad():
            return bytes_of(model(**batch, use_cache=True, logits_to_keep=1).past_key_values)
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return None


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bytes_of(cache: Any) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def compare(args: argparse.Namespace, model: Any, image_tokens: int) -> None:
    """Time the baseline and every method by turns, and print the ratios."""
    batch = make_batch(args, image_tokens, model)
    runs: dict[str, Any] = {"none": None, **METHODS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    caches: dict[str, int | None] = {}
    peaks: dict[str, int] = {}
    for turn in range(args.repeats + 1):  # the first warms up
        for name, method in runs.items():
            model.set_reduction(method)
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(lambda: caches.update({name: step(model, batch, args.train)}), args.device)  # noqa: B023
            if turn:
                times[name].append(taken)
            if args.device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated()
    kind = "training step" if args.train else "prefill"
    print(f"\n{kind}: {image_tokens} image tokens + {TEXT_BEFORE + TEXT_AFTER} text, batch {args.batch}")
    baseline = statistics.median(times["none"])
    print(f"  {'none':12s} {baseline * 1e3:9.1f} ms")
    for name, method in runs.items():
        model.set_reduction(method)
        lengths = layer_lengths(model, image_tokens)
        if name != "none":
            share = layer_flops(model, lengths) / layer_flops(model, lengths[:1] * len(lengths))
            ratio = statistics.median(a / b for a, b in zip(times[name], times["none"], strict=True))
            print(
                f"  {name:12s} {statistics.median(times[name]) * 1e3:9.1f} ms   time ratio {ratio:.3f}   FLOP ratio "
                f"{share:.3f}   time / FLOP {ratio / share:.3f}"
            )
        if caches[name] is not None:
            formula = int(cache_bytes(Widths.of(model.config), lengths, model.dtype.itemsize, args.batch))
            got = caches[name]
            print(
                f"  {'':12s} KV cache {got:,} bytes; by the formula {formula:,}{'' if got == formula else '  DIFFERS'}"
            )
        if name in peaks:
            print(f"  {'':12s} peak memory {peaks[name] / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2752)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as heads")
    parser.add_argument("--train", action="store_true", help="time a training step instead of the prefill")
    parser.add_argument("--attention", default="sdpa", help="eager, sdpa or flash_attention_2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(args).train(args.train)
    print(
        f"Llama: width {args.width}, {args.layers} layers, {args.heads} heads, MLP {args.intermediate}, {args.dtype}, "
        f"{args.attention}, {args.device}, {torch.get_num_threads()} threads"
    )
    for image_tokens in args.image_tokens:
        compare(args, model, image_tokens)


if __name__ == "__main__":
    main()
