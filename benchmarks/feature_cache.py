"""Training samples a second with and without a feature cache, and what a picture takes on disk, by turns in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.feature_cache [--samples 24] [--batch 8] [--repeats 2]
    python -m benchmarks.feature_cache --tower 1024,24,4096,16 --llm 4096,32,11008,32 --samples 512 --device cuda

Random weights; photographs of noise, 640 x 480, as JPEG; each sample has a picture and 40 words. `pretrain` trains the
projector, `finetune` the language model too. Loading and the first step are left out. The cache is made before. On
the CPU it is the process's own time that counts, so that others on the machine do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from llava.data.feature_cache import FeatureCache
from llava.messages import set_up_messages
from llava.train import cache_features
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer

TOKENIZER = Path(__file__).parents[1] / "playground/toy/models/vicuna"
METHODS = {
    "baseline": "none",
    "prumerge, 40 tokens": "{name: prumerge, tokens: 40}",
    "stf, 2 blocks": "{name: stf, mbtf: [4, 2]}",
}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"tune_mm_mlp_adapter": True, "version": "plain"},
    "finetune": {"version": "v1"},
}


def make_world(folder: Path, args: argparse.Namespace) -> None:
    """Models, pictures and conversations."""
    torch.manual_seed(0)
    width, depth, inner, heads = map(int, args.tower.split(","))
    vision = {"image_size": 336, "patch_size": 14, "hidden_size": width, "intermediate_size": inner}
    CLIPVisionModel(CLIPVisionConfig(**vision, num_hidden_layers=depth, num_attention_heads=heads)).save_pretrained(
        folder / "clip"
    )
    square = {"height": 336, "width": 336}
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=square).save_pretrained(folder / "clip")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    width, depth, inner, heads = map(int, args.llm.split(","))
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}
    config = LlamaConfig(**sizes, num_attention_heads=heads, vocab_size=len(tokenizer), max_position_embeddings=2048)
    Llama(config).to(torch.bfloat16 if args.device == "cuda" else torch.float32).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    samples = []
    for number in range(args.samples):
        noise = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
        text = " ".join(["a picture of noise"] * 10)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}]
        samples.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))


def run_flags(folder: Path, args: argparse.Namespace, stage: str, **settings: Any) -> list[str]:
    """Of a run."""
    steps = max(2, args.samples // args.batch)
    values = {
        "model_name_or_path": folder / "llm",
        "vision_tower": folder / "clip",
        "data_path": folder / "data.json",
        "image_folder": folder / "images",
        "output_dir": folder / "run",
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "model_max_length": 1024,
        "per_device_train_batch_size": args.batch,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "preflight_seconds": 0,
        "dataloader_num_workers": args.workers,
        "bf16": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "gradient_checkpointing": args.device == "cuda",
        "disable_tqdm": True,
        **STAGES[stage],
        **settings,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def samples_per_second(folder: Path, flags: list[str], args: argparse.Namespace) -> float:
    """From the end of the first step to that of the last."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    whole, ends = LLaVATrainer.training_step, []

    def step(self: Any, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        loss = whole(self, *inputs, **kwargs)
        loss.item()  # the device has done its part
        ends.append(clock())
        return loss

    with mock.patch.object(LLaVATrainer, "training_step", step):
        train(parse_args(flags))
    return args.batch * (len(ends) - 1) / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--tower", default="192,5,768,4", help="width, layers, intermediate width, heads")
    parser.add_argument("--llm", default="256,4,688,4", help="the same of the language model")
    parser.add_argument("--stages", default="pretrain,finetune")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    set_up_messages()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder, args)
        for method, reduction in METHODS.items():
            cache = folder / method.partition(",")[0]
            flags = run_flags(folder, args, "pretrain", reduction=reduction, feature_cache=cache)
            start = time.perf_counter()
            cache_features.main(flags)
            seconds, size = time.perf_counter() - start, FeatureCache(cache).total_bytes / args.samples / 1024
            print(f"{method}: {size:.1f} KiB a picture, made at {args.samples / seconds:.1f} pictures/s with loading")
            for stage in args.stages.split(","):
                rates: dict[str, list[float]] = {"pixels": [], "features": []}
                for _ in range(args.repeats):
                    for way, place in (("pixels", None), ("features", cache)):
                        argv = run_flags(folder, args, stage, reduction=reduction, feature_cache=place)
                        rates[way].append(samples_per_second(folder, argv, args))
                ratio = statistics.median(b / a for a, b in zip(rates["pixels"], rates["features"], strict=True))
                spread = "  ".join(
                    f"{way} {statistics.median(values):.2f}/s ({min(values):.2f} to {max(values):.2f})"
                    for way, values in rates.items()
                )
                print(f"{method:20s} {stage:9s} {spread}  features/pixels {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()
