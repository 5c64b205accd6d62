"""What an encoder-side reducer costs, as a share of the vision tower's forward.

    python benchmarks/encoder_reducers.py [--batch 8] [--repeats 5] [--device cuda --dtype bfloat16]

The tower is CLIP-L/336 with random weights. Both are timed in one run, by turns; what counts as the reducer's cost is
all that is not done without it: a block's layer norm, its key and query projections or CLIP's visual projection,
and the reducer. TRIM's text tower, which runs once a sample, is timed apart. The tower's forward is that of all tokens,
as it runs without reduction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig

from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.reduction import VisionFeatures, VisualTokens, build

METHODS = {
    "prumerge adaptive": ("prumerge", {}),
    "prumerge 1/8": ("prumerge", {"ratio": 1 / 8}),
    "prumerge 1/4": ("prumerge", {"ratio": 1 / 4}),
    "prumerge_plus adaptive": ("prumerge_plus", {}),
    "prumerge_plus 1/8": ("prumerge_plus", {"ratio": 1 / 8}),
    "prumerge 1/4, paper": ("prumerge", {"ratio": 1 / 4, "variant": "paper"}),
    "prumerge_plus 1/8, paper": ("prumerge_plus", {"ratio": 1 / 8, "variant": "paper"}),
    "trim 1/4": ("trim", {"ratio": 1 / 4}),
    "trim 1/4, paper": ("trim", {"ratio": 1 / 4, "variant": "paper"}),
    "spatial 12 x 12": ("spatial", {"rows": 12, "columns": 12}),
    "random 1/4": ("random", {"ratio": 1 / 4}),
    "visionzip 54 + 10": ("visionzip", {}),
    "divprune 64": ("divprune", {"tokens": 64}),
    "vscan 96": ("vscan", {}),
    "mmtok 64": ("mmtok", {"tokens": 64}),
    "fastervlm 64": ("fastervlm", {}),
    "vispruner 64": ("vispruner", {}),
    "cdpruner 64": ("cdpruner", {}),
    "holov 64": ("holov", {}),
}


def clip_large_336() -> CLIPVisionConfig:
    """The encoder of openai/clip-vit-large-patch14-336."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    tower = VisionTower(clip_large_336(), "clip")
    tower.add_text_tower(CLIPTextConfig(hidden_size=768, num_attention_heads=12, projection_dim=768))
    tower.eval().to(args.device, dtype)
    pixels = torch.randn(args.batch, 3, tower.image_size, tower.image_size, device=args.device, dtype=dtype)
    features = tower(pixels).features
    # What enters the block that is read: the selected hidden state with CLS in front, or as good as it.
    projected = torch.randn(*features.shape[:2], 4096, device=args.device, dtype=dtype)
    hidden = torch.nn.functional.pad(features, (0, 0, 1, 0)).normal_()
    hidden[:, 1:] = features

    def cost_of(name: str, options: dict[str, object]) -> Callable[[], object]:
        reducer = build(name, **options)

        def run() -> object:
            vision = VisionFeatures(features, grid=tower.grid)
            needs = reducer.needs
            tower.read_attention({tower.block_number(place): hidden for place in needs.places}, needs, vision)
            vision.cls, vision.projected = hidden[:, 0], projected if needs.projected else None
            vision.text = words if needs.text == "words" else text
            if needs.patch_embeds:
                vision.patch_embeds = tower.text_tower.embed_patches(features, tower.vision_tower.post_layernorm)
            return reducer(vision)

        return run

    text = torch.randn(args.batch, 768, device=args.device, dtype=dtype)
    words = torch.randn(args.batch, 16, 4096, device=args.device, dtype=dtype)
    ids = torch.full((args.batch, 77), 49407, device=args.device)
    runs: dict[str, Callable[[], object]] = {label: cost_of(*method) for label, method in METHODS.items()}
    runs["trim's text tower"] = lambda: tower.text_tower.text_model(input_ids=ids)
    times: dict[str, list[float]] = {label: [] for label in ["tower", *runs]}
    for run in runs.values():
        run()
    for _ in range(args.repeats):
        times["tower"].append(seconds(lambda: tower(pixels), args.device))
        for label, run in runs.items():
            times[label] += [seconds(run, args.device) for _ in range(5)]
    forward = statistics.median(times["tower"])
    print(f"CLIP-L/336, batch {args.batch}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'tower forward':24s} {forward * 1e3:10.1f} ms")
    for label, run in runs.items():
        own = statistics.median(times[label])
        result = run()
        kept = f"{result.counts.float().mean().item():6.1f} tokens kept" if isinstance(result, VisualTokens) else ""
        print(f"{label:24s} {own * 1e3:10.1f} ms   {own / forward:7.3%} of the tower   {kept}")


if __name__ == "__main__":
    main()
