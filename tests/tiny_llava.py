"""A tiny random LLaVA checkpoint with a real tokenizer."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig

from llava.model.language_model.families import llava_class_for
from tests.conftest import ROOT


def save_tiny_llava(folder: Path) -> Path:
    """Write a random LLaVA of 4 x 4 patches that reduces with PruMerge; its folder is `folder`/model."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPConfig(text_config=small | {"vocab_size": 64}, vision_config=small | {"image_size": 32, "patch_size": 8})
    CLIPModel(clip).save_pretrained(folder / "clip")
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder / "clip")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "playground" / "toy" / "models" / "vicuna")
    cls = llava_class_for("llama")
    model = cls(cls.config_class(**LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **small).to_diff_dict()))
    vision = {"vision_tower": str(folder / "clip"), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    more = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", "pretrain_mm_mlp_adapter": None}
    model.get_model().initialize_vision_modules(types.SimpleNamespace(**vision, **more))
    model.set_reduction("prumerge")
    model.config.image_aspect_ratio = "pad"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"
