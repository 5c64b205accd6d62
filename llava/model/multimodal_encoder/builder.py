"""Build the vision tower that a model's config describes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, CLIPTextConfig, PreTrainedConfig

from llava.model.multimodal_encoder.vision_tower import VisionTower, resolve_vision_config


def build_vision_tower(config: Any, kind: str = "vision") -> VisionTower:
    """The tower of `config.mm_vision_tower`, without its weights.

    The encoder's own configuration is kept in `config.mm_vision_config`, so that a checkpoint that holds the tower's
    weights opens without the tower's folder.

    Args:
        config: of the model.
        kind: "video" for the one of `mm_video_tower` and `mm_video_config`.
    """
    name = getattr(config, f"mm_{kind}_tower")
    encoder_config = _encoder_config(name, getattr(config, f"mm_{kind}_config", None))
    setattr(config, f"mm_{kind}_config", encoder_config.to_dict())
    # The attention backend is the whole model's; without one the encoder picks its own.
    if getattr(config, "_attn_implementation", None) is not None:
        encoder_config._attn_implementation = config._attn_implementation
    return VisionTower(
        encoder_config,
        name=name,
        select_layer=getattr(config, "mm_vision_select_layer", -2),
        select_feature=getattr(config, "mm_vision_select_feature", "patch"),
    )


def add_text_tower(tower: VisionTower, config: Any) -> None:
    """Build CLIP's text tower, without its weights, as `config.mm_text_config` or the tower's folder says."""
    kept = getattr(config, "mm_text_config", None)
    tower.add_text_tower(None if kept is None else CLIPTextConfig.from_dict(kept))
    if tower.text_tower is not None:
        config.mm_text_config = tower.text_tower.config.to_dict()


def _encoder_config(name: str, kept: dict[str, Any] | None) -> PreTrainedConfig:
    if kept is None:
        return resolve_vision_config(name)
    return CONFIG_MAPPING[kept["model_type"]].from_dict(kept)
