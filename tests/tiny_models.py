"""Tiny random LLaVA models, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig

from llava.constants import IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.model.language_model.families import llava_class_for

SIDE, PATCH, VOCAB = 56, 14, 96
BACKBONES = ("llama", "mistral", "qwen2", "qwen3")
MARKERS = {"image": IMAGE_TOKEN_INDEX, "clip": VIDEO_TOKEN_INDEX}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def vision_config(kind: str = "clip", depth: int = 4, side: int = SIDE) -> Any:
    """Configuration of a small CLIP or SigLIP image encoder."""
    cls = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind]
    return cls(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
    )


def tiny_model(
    backbone: str = "llama", tower: str = "clip", anyres: bool = False, seed: int = 0, **settings: Any
) -> Any:
    """A LLaVA model with random weights in eval mode; `settings` go to its config."""
    torch.manual_seed(seed)
    cls = llava_class_for(backbone)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": "tiny",
        "mm_vision_config": vision_config(tower).to_dict(),
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "image_grid_pinpoints": PINPOINTS if anyres else None,
        **settings,
    }
    return cls(cls.config_class(**values)).eval()


def prompt(*parts: int | str, seed: int = 0) -> torch.Tensor:
    """Ids of a prompt, [S]: a number stands for that many random tokens, "image" for an image, "clip" for a clip."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.tensor([1])]
    for part in parts:
        if part in MARKERS:
            ids.append(torch.tensor([MARKERS[part]]))
        else:
            ids.append(torch.randint(3, VOCAB, (int(part),), generator=generator))
    return torch.cat(ids)


def pad(rows: list[torch.Tensor], side: str, value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as a batch [B, S], and its attention mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
