"""Samples a second of training: padded, grouped by length, and packed, with and without PyramidDrop.

    python benchmarks/packing.py [--samples 96] [--batch 16] [--repeats 3] [--scale 0.25]
    python benchmarks/packing.py --width 4096 --intermediate 11008 --heads 32 --layers 8 --device cuda

The lengths are like those of LLaVA's 665k mix, not the mix itself: the shares of its data sets are those of the
LLaVA-1.5 paper (Table 7), the lengths of their texts are rough guesses written below; an image has 576 tokens. The same
samples go through a forward and a backward pass in each way, by turns, in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from llava.constants import IGNORE_INDEX
from llava.model.language_model.families import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.packed import PACKED_SDPA
from llava.train.sampler import ModalityLengthSampler

# Data set: thousands of samples, median tokens of text, spread (sigma of a log-normal), whether it has images.
MIX = {
    "LLaVA conversations": (158, 350, 0.5, True),
    "VQAv2": (83, 250, 0.6, True),
    "GQA": (72, 250, 0.6, True),
    "OKVQA": (9, 120, 0.4, True),
    "OCR-VQA": (80, 200, 0.3, True),
    "A-OKVQA": (66, 150, 0.4, True),
    "TextCaps": (22, 100, 0.2, True),
    "RefCOCO": (48, 350, 0.6, True),
    "Visual Genome": (86, 400, 0.6, True),
    "ShareGPT": (40, 1100, 0.7, False),
}
IMAGE_TOKENS, MAX_LENGTH, SYSTEM = 576, 2048, 35


def draw_samples(count: int, scale: float, seed: int) -> list[tuple[int, int]]:
    """(tokens of text, tokens of its image or 0) of each sample."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([float(size) for size, *_ in MIX.values()])
    samples = []
    for kind in torch.multinomial(shares, count, replacement=True, generator=generator).tolist():
        _, median, sigma, has_image = list(MIX.values())[kind]
        text = int(median * torch.exp(sigma * torch.randn((), generator=generator)))
        image = IMAGE_TOKENS * has_image
        text = min(max(text, SYSTEM + 10), MAX_LENGTH - image)
        samples.append((int(text * scale), int(image * scale)))
    return samples


def make_batch(chosen: list[tuple[int, int]], width: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random embeddings, padded on the right; the last half of the text is learnt."""
    lengths = [text + image for text, image in chosen]
    shape = (len(chosen), max(lengths))
    mask, image_index = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, ((text, image), length) in enumerate(zip(chosen, lengths, strict=True)):
        mask[i, :length] = 1
        labels[i, length - text // 2 : length] = 1
        image_index[i, text // 4 : text // 4 + image] = i
    tensors = {"attention_mask": mask, "image_index": image_index, "labels": labels}
    embeds = torch.randn(*shape, width, dtype=like.dtype, device=like.device)
    return {"inputs_embeds": embeds, **{name: tensor.to(like.device) for name, tensor in tensors.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths, for a small machine")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--attention", default=PACKED_SDPA, help=f"{PACKED_SDPA} or flash_attention_2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    model = build_model(args)
    samples = draw_samples(args.samples, args.scale, seed=0)
    lengths = [text + image for text, image in samples]
    grouped = list(
        ModalityLengthSampler(
            [n if image else -n for n, (_, image) in zip(lengths, samples, strict=True)],
            batch_size=args.batch,
            batches_per_step=1,
            seed=0,
        )
    )
    ways: dict[str, tuple[list[int], bool]] = {
        "padded": (list(range(args.samples)), False),
        "grouped": (grouped, False),
        "packed": (list(range(args.samples)), True),
    }
    times: dict[tuple[str, str], list[float]] = {}
    padding = {}
    for turn in range(args.repeats + 1):  # the first warms up
        for method in ("none", "pyramiddrop"):
            model.set_reduction(method)
            for way, (order, packed) in ways.items():
                taken, real, slots = 0.0, 0, 0
                for start in range(0, args.samples, args.batch):
                    batch = make_batch([samples[i] for i in order[start : start + args.batch]], args.width, like(model))
                    real += int(batch["attention_mask"].sum())
                    slots += batch["attention_mask"].numel()
                    taken += step(model, batch, packed, args.device)
                padding[way] = 0.0 if packed else 1 - real / slots
                if turn:
                    times.setdefault((method, way), []).append(taken)
    mean = sum(lengths) / len(lengths)
    print(
        f"{args.samples} samples of {min(lengths)} to {max(lengths)} tokens, mean {mean:.0f}, batch {args.batch}; "
        f"width {args.width}, {args.layers} layers, {args.dtype}, {args.attention}, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    for (method, way), values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[method, "padded"], values, strict=True))
        rate = args.samples / statistics.median(values)
        print(f"{method:12s} {way:8s} {rate:8.2f} samples/s   {ratio:5.2f} x padded   {padding[way]:5.1%} padding")


def build_model(args: argparse.Namespace, vocabulary: int = 1024) -> Any:
    """A Llama with random weights in LLaVA's class, without a vision tower."""
    config = LlavaLlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=vocabulary,
        use_cache=False,
        attn_implementation=args.attention,
    )
    torch.manual_seed(0)
    return LlavaLlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).train()


def like(model: Any) -> torch.Tensor:
    """A weight, for dtype and device."""
    return model.lm_head.weight


def step(model: Any, batch: dict[str, torch.Tensor], packed: bool, device: str) -> float:
    """Seconds of a forward and a backward pass."""
    if device != "cpu":
        torch.cuda.synchronize()  # the batch may still be on its way
    start = time.perf_counter()
    model(**batch, packed=packed).loss.backward()
    if device != "cpu":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return taken


if __name__ == "__main__":
    main()
