"""What the papers' experiments start from: where it comes from, how large it is, and how much it holds.

Sizes are in GB and roughly right, for planning; None where they are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Download:
    """A file, folder or model that users bring.

    Attributes:
        source: where it comes from.
        size: in GB; None: not known.
    """

    source: str
    size: float | None = None


@dataclass(frozen=True)
class TrainingData:
    """A file of conversations with its images.

    Attributes:
        samples: how many it has.
        text_tokens: of a sample beside its image, on average: an estimate for planning.
        file: the file itself.
        images: what lies in the image folder, by path within it.
    """

    samples: int
    text_tokens: int
    file: Download
    images: Mapping[str, Download]


# Models by their names on the hub; other names are shown without a size.
MODELS = {
    "lmsys/vicuna-7b-v1.5": 13.5,
    "lmsys/vicuna-13b-v1.5": 26.0,
    "openai/clip-vit-large-patch14-336": 1.7,
    "liuhaotian/llava-v1.5-7b": 13.5,
    "liuhaotian/llava-v1.5-13b": 26.1,
    "LanguageBind/Video-LLaVA-7B": 15.0,
}
# What the cost model calls a language model or checkpoint, by the hub's name; of a language model that of LLaVA-1.5.
PRESETS = {
    "lmsys/vicuna-7b-v1.5": "llava-1.5-7b",
    "lmsys/vicuna-13b-v1.5": "llava-1.5-13b",
    "liuhaotian/llava-v1.5-7b": "llava-1.5-7b",
    "liuhaotian/llava-v1.5-13b": "llava-1.5-13b",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-1.6-vicuna-7b",
    "LanguageBind/Video-LLaVA-7B": "video-llava-7b",
}
TILED = {"llava-1.5-7b": "llava-1.6-vicuna-7b", "llava-1.5-13b": "llava-1.6-vicuna-13b"}
"""The presets with the image settings of LLaVA-NeXT."""

PROJECTORS = {
    "llava-v1.5-7b-pretrain": Download(f"{HUB}/liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5", 0.04),
    "llava-v1.5-13b-pretrain": Download(f"{HUB}/liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-13b-v1.5", 0.06),
}
"""LLaVA-1.5's own pretrained projectors, by the folder that mm_projector.bin goes into."""

_VISUAL_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_COMMON = {
    "coco/train2017": Download("http://images.cocodataset.org/zips/train2017.zip", 18.0),
    "gqa/images": Download("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", 20.3),
    "ocr_vqa/images": Download("https://ocr-vqa.github.io, by its download script, all as .jpg"),
    "textvqa/train_images": Download("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", 6.6),
    "vg/VG_100K": Download(f"{_VISUAL_GENOME}/images.zip", 9.2),
    "vg/VG_100K_2": Download(f"{_VISUAL_GENOME}/images2.zip", 5.5),
}
_NEXT_DATA = f"{HUB}/datasets/Lin-Chen/Open-LLaVA-NeXT-mix1M"
TRAINING = {
    "blip_laion_cc_sbu_558k.json": TrainingData(
        558_128,
        40,
        Download(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain", 0.2),
        {".": Download(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain, images.zip", 27.0)},
    ),
    "llava_v1_5_mix665k.json": TrainingData(
        665_298, 300, Download(f"{HUB}/datasets/liuhaotian/LLaVA-Instruct-150K", 1.0), _COMMON
    ),
    "open-llava-next_instruct_mix1M.json": TrainingData(
        1_000_000,
        300,
        Download(_NEXT_DATA, 1.6),
        {
            **_COMMON,
            ".": Download(f"{_NEXT_DATA}, vqa_collection.zip, and the others of Open-LLaVA-NeXT's docs/Data.md", 30.2),
        },
    ),
}
"""By the file's name."""

EVALUATION = {
    "val2014": 6.0,
    "test2015": 12.0,
    "data/images": 20.3,
    "train_images": 6.6,
}
"""Sizes of the pictures of benchmarks that state one, by their place in the task's folder."""

QUESTIONS = {
    "vqav2": 107_394,
    "vqav2_val": 214_354,
    "gqa": 12_578,
    "vizwiz": 8_000,
    "vizwiz_val": 4_319,
    "scienceqa": 4_241,
    "textvqa": 5_000,
    "textvqa_no_ocr": 5_000,
    "pope": 8_910,
    "mme": 2_374,
    "mmbench": 4_377,
    "mmbench_cn": 4_329,
    "seed": 17_990,
    "seed_img": 14_233,
    "llavabench": 60,
    "mmvet": 218,
    "mmstar": 1_500,
    "docvqa": 5_349,
    "docvqa_test": 5_188,
    "infovqa": 2_801,
    "infovqa_test": 3_288,
    "chartqa": 2_500,
    "ocrvqa": 100_000,
    "qbench": 1_495,
    "msvd_qa": 13_157,
    "msrvtt_qa": 72_821,
    "activitynet_qa": 8_000,
    "tgif_qa": 25_751,
    "toy": 200,
}
"""Of a task, for planning; MMBench asks each in several orders of its options."""

FRAMES = dict.fromkeys(("msvd_qa", "msrvtt_qa", "activitynet_qa", "tgif_qa"), 8)
"""Of a question, where a task asks about clips."""


def find_projector(path: Path) -> Download | None:
    """LLaVA's own projector that belongs at this path, if it is one of them."""
    return PROJECTORS.get(path.parent.name)
