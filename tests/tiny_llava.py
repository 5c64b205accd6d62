"""A tiny random LLaVA checkpoint with a real tokenizer."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig

from llava.model.language_model.families import llava_class_for
from tests.conftest import ROOT

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_tiny_llava(
    folder: Path, clip: Path | None = None, reduction: str | None = "prumerge", **settings: Any
) -> Path:
    """Write a random LLaVA of 4 x 4 patches; its folder is `folder`/model. `settings` go to its language model."""
    torch.manual_seed(0)
    clip = clip or _save_clip(folder / "clip")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "playground" / "toy" / "models" / "vicuna")
    cls = llava_class_for("llama")
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **{**SMALL, **settings})
    model = cls(cls.config_class(**config.to_diff_dict()))
    vision = {"vision_tower": str(clip), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    more = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", "pretrain_mm_mlp_adapter": None}
    model.get_model().initialize_vision_modules(types.SimpleNamespace(**vision, **more))
    model.set_reduction(reduction)
    model.config.image_aspect_ratio = "pad"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _save_clip(folder: Path) -> Path:
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=SMALL | {"vocab_size": 64}, vision_config=vision)).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder
