"""Models known by a name: their configurations, so that nothing need be on the disk to plan with them."""

from __future__ import annotations

from typing import Any

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
LANGUAGEBIND = "LanguageBind/LanguageBind_Image"
# CLIP's large tower for pictures of 224 pixels, and the same for frames.
_LANGUAGEBIND = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}

# Towers that a checkpoint's config may name without holding their configuration.
TOWERS: dict[str, dict[str, Any]] = {
    CLIP: {
        "mm_vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "mm_text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    },
    LANGUAGEBIND: {
        "mm_vision_config": _LANGUAGEBIND,
        "mm_video_config": _LANGUAGEBIND,
    },
    SIGLIP: {
        "mm_vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        }
    },
}

_VICUNA = {"model_type": "llava_llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_7B = {
    **_VICUNA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_13B = {
    **_VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_MISTRAL = {
    "model_type": "llava_mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
_1_5 = {
    "mm_vision_tower": CLIP,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
}
_NEXT = {
    **_1_5,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
_VIDEO_LLAVA = {
    **_1_5,
    "mm_vision_tower": LANGUAGEBIND,
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
    "image_aspect_ratio": None,
}

MODELS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {**_7B, **_1_5},
    "llava-1.5-13b": {**_13B, **_1_5},
    "llava-1.6-vicuna-7b": {**_7B, **_NEXT},
    "llava-1.6-vicuna-13b": {**_13B, **_NEXT},
    "llava-1.6-mistral-7b": {**_MISTRAL, **_NEXT},
    "video-llava-7b": {**_7B, **_VIDEO_LLAVA},
}
ALIASES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b"}
