"""Tiny random models, a tokenizer and data in LLaVA's formats, made on the spot: training runs in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
SIDE, PATCH = 32, 8
COLORS = ("red", "green", "blue", "black")


@dataclass(frozen=True)
class TinyWorld:
    """Paths of what a training run reads."""

    root: Path

    @property
    def llm(self) -> Path:
        return self.root / "llm"

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def captions(self) -> Path:
        return self.root / "captions.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def flags(self, output_dir: Path, /, **settings: object) -> list[str]:
        """A short run's command line; a setting of None leaves the flag out."""
        values = {
            "model_name_or_path": self.llm,
            "vision_tower": self.clip,
            "version": "v1",
            "data_path": self.data,
            "image_folder": self.images,
            "output_dir": output_dir,
            "image_aspect_ratio": "pad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "model_max_length": 512,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
            **settings,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


def make_tiny_world(root: Path, llm_layers: int = 2, clip_layers: int = 3) -> TinyWorld:
    """Write models of so many layers, tokenizer, images and conversations below `root`."""
    world = TinyWorld(root)
    torch.manual_seed(0)
    _make_tokenizer().save_pretrained(world.llm)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=llm_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(world.llm)
    width = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": clip_layers, "num_attention_heads": 2}
    vision = {**width, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.2}
    text = {**width, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(world.clip)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(world.clip)
    _write_data(world)
    return world


def make_readable(folder: Path) -> None:
    """Give the CLIP in `folder` a tokenizer, whose words are letters, and texts that it can tell apart."""
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *"01234567"]
    vocabulary = {word: i for i, word in enumerate([*words, "!!", "?</w>", "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder)
    clip.config.text_config.eos_token_id = tokenizer.eos_token_id
    for weight in clip.text_model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.5)  # otherwise all texts look alike
    clip.save_pretrained(folder)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and Llama's special tokens at their usual places."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _write_data(world: TinyWorld) -> None:
    world.images.mkdir(parents=True)
    samples = []
    for index in range(12):
        color = COLORS[index % len(COLORS)]
        has_image = index % 3 != 2
        question = "What color is it?" if has_image else f"Say {color}" + "!" * index
        sample = {
            "id": str(index),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if has_image else "") + question},
                {"from": "gpt", "value": color},
            ],
        }
        if has_image:
            sample["image"] = f"{color}.png"
            Image.new("RGB", (40 + index, 30), color).save(world.images / f"{color}.png")
        samples.append(sample)
    world.data.write_text(json.dumps(samples), encoding="utf-8")
    captions = [sample for sample in samples if "image" in sample]
    world.captions.write_text(json.dumps(captions), encoding="utf-8")


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python on the CPU with one thread."""
    return run_command([sys.executable, *map(str, arguments)], **environment)


def run_command(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the root of the repository, in an environment without a launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    binaries = str(Path(sys.executable).parent)
    settings = {
        **kept,
        "PATH": f"{binaries}{os.pathsep}{kept.get('PATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
