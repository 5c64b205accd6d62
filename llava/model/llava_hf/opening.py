"""The llava-hf layouts: Llava-, LlavaNext- and VideoLlavaForConditionalGeneration of transformers.

The same weights as LLaVA's under other names, a config that nests those of the language model and the vision tower,
and an `<image>` token in the vocabulary (a `<video>` token too, for Video-LLaVA).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava.model.language_model.families import llava_class_for
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.processor import processor_settings
from llava.model.weights import (
    VIDEO_TOWER_PREFIX,
    check_files,
    check_loaded,
    raise_for_keys,
    raise_for_nonfinite,
    read_json,
    without_load_report,
)

logger = logging.getLogger(__name__)

HF_TYPES = ("llava", "llava_next", "video_llava")
KEPT = "llava_settings"
"""Key of an hf config under which `llava.model.convert` keeps what that layout has no place for."""

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_STRATEGIES = {
    ("llava", _CLIP): ("default", "full"),
    ("llava", _SIGLIP): ("full",),
    ("llava_next", _CLIP): ("default",),
    ("llava_next", _SIGLIP): ("full",),
    ("video_llava", _CLIP): ("default",),
}

# Names in the files, as old and present releases of transformers write them, and our names.
_FROM_HF = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.vision_tower.",
    r"^(?:model\.)?image_tower\.(?:vision_model\.)?": "model.vision_tower.vision_tower.",
    r"^(?:model\.)?video_tower\.(?:vision_model\.)?": "model.video_tower.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^image_newline$": "model.image_newline",
}
# Our names, and those that every release of transformers reads; the first that fits.
_TO_HF = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^model\.image_newline$": "image_newline",
    r"^model\.(embed_tokens|layers|norm)\.": r"language_model.model.\1.",
}


# With two towers, that of pictures has another name there.
_TOWERS_TO_HF = {
    r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "image_tower.vision_model.",
    r"^model\.video_tower\.vision_tower\.(?:vision_model\.)?": "video_tower.vision_model.",
}


def to_hf_name(name: str, two_towers: bool = False) -> str:
    """The name of one of our weights in the llava-hf layouts.

    >>> to_hf_name("model.mm_projector.2.bias")
    'multi_modal_projector.linear_2.bias'
    """
    for pattern, replacement in {**_TO_HF, **(_TOWERS_TO_HF if two_towers else {})}.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"the llava-hf layouts have no place for the weight {name}")


def open_hf_checkpoint(folder: Path, vision_tower: str | None, kwargs: dict[str, Any]) -> Any:
    """Open a llava-hf checkpoint as our model. Its vocabulary stays as it is, `<image>` and padding rows included.

    Args:
        folder: with config.json and weights, in safetensors or .bin files.
        vision_tower: folder or hub name to take the tower's configuration from in place of the checkpoint's, and its
            weights where the checkpoint has none.
        kwargs: for transformers' from_pretrained: dtype, device_map, attn_implementation, quantization_config.

    Raises:
        ValueError: a kind of model that LLaVA does not have; or weights that are missing, unexpected or of another
            shape; the keys are listed.
    """
    hf = read_hf_config(folder)
    config = from_hf_config(hf, folder)
    check_files(folder, quantized=getattr(hf, "quantization_config", None) is not None)
    if vision_tower is not None:
        config.mm_vision_tower, config.mm_vision_config = vision_tower, None
    cls = llava_class_for(config.model_type)
    with without_load_report():
        # Past LLaVA's own from_pretrained, which would look for a missing tower's weights in this folder.
        model, info = super(LlavaMetaForCausalLM, cls).from_pretrained(
            str(folder),
            config=config,
            key_mapping=_FROM_HF,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    tower = check_loaded(info, folder)
    read = ((name, weight) for name, weight in model.named_parameters() if name not in info["missing_keys"])
    raise_for_nonfinite(folder, read)
    lacks_frames = any(key.startswith(VIDEO_TOWER_PREFIX) for key in tower)
    if tower and (vision_tower is None or lacks_frames):
        raise_for_keys(folder, missing=sorted(tower))
    if tower:
        model.get_vision_tower().load_weights()
    return model


def read_hf_config(folder: Path) -> Any:
    """transformers' configuration of a llava-hf folder.

    Raises:
        ValueError: its config.json is not that of one.
    """
    _check_types(read_json(folder / "config.json"), folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises its own types for values it can't take
        raise ValueError(f"{folder / 'config.json'} can't be read as a llava-hf config ({error})") from error


def _check_types(raw: dict[str, Any], file: Path) -> None:
    """Raise ValueError for parts of a config.json that transformers would take for default models."""
    for key in ("text_config", "vision_config"):
        if not isinstance(raw[key], dict) or not isinstance(raw[key].get("model_type"), str):
            raise ValueError(f"{file}: {key} is {str(raw[key])[:60]}, expected a model's config with its model_type")
    kept = raw.get(KEPT) or {}
    if not isinstance(kept, dict) or not isinstance(kept.get("config", {}), dict):
        raise ValueError(f"{file}: {KEPT} is {str(kept)[:60]}, expected what llava convert writes")


def from_hf_config(hf: Any, folder: Path) -> PreTrainedConfig:
    """Our config for that of a llava-hf checkpoint.

    Raises:
        ValueError: it describes something that LLaVA's layout can't express; the key is named.
    """
    _check_expressible(hf, folder)
    cls = llava_class_for(hf.text_config.model_type).config_class
    text = {k: v for k, v in hf.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    kept = getattr(hf, KEPT, None) or {}
    pad = getattr(hf, "pad_token_id", None)
    own = {"mm_vision_tower": str(folder)}
    if hf.model_type == "video_llava":  # pictures are padded or not, which the layout has no place for
        own |= {"mm_video_tower": str(folder), "image_aspect_ratio": "square"}
    values = {
        **text,
        **own,
        **kept.get("config", {}),
        **_vision_values(hf, folder),
        "tie_word_embeddings": hf.tie_word_embeddings,
        "dtype": hf.dtype or hf.text_config.dtype,
        "pad_token_id": text.get("pad_token_id") if pad is None else pad,
    }
    return cls.from_dict(values)


def _check_expressible(hf: Any, folder: Path) -> None:
    """Raise for a setting that our model has no counterpart of."""
    path = folder / "config.json"
    if hf.model_type not in HF_TYPES:
        raise ValueError(f"{path}: model_type {hf.model_type!r}; of the llava-hf layouts {', '.join(HF_TYPES)} open")
    if not isinstance(hf.vision_feature_layer, int):
        raise ValueError(
            f"{path}: vision_feature_layer={hf.vision_feature_layer}: this model reads one layer of the vision tower, "
            "not several"
        )
    if hf.projector_hidden_act != "gelu" or not hf.multimodal_projector_bias:
        raise ValueError(
            f"{path}: projector_hidden_act={hf.projector_hidden_act!r}, multimodal_projector_bias="
            f"{hf.multimodal_projector_bias}: LLaVA's projector has 'gelu' and biases"
        )
    tower = hf.vision_config.model_type
    if tower not in (_CLIP, _SIGLIP):
        raise ValueError(f"{path}: vision_config.model_type={tower!r}: a tower is {_CLIP} or {_SIGLIP}")
    strategy = hf.vision_feature_select_strategy
    if strategy not in _STRATEGIES[hf.model_type, tower]:
        raise ValueError(
            f"{path}: vision_feature_select_strategy={strategy!r} on a {tower} does not work in {hf.model_type}: "
            "'default' drops a class token, which only CLIP has, and the tiles of llava_next must come without one"
        )


def _vision_values(hf: Any, folder: Path) -> dict[str, Any]:
    """LLaVA's keys for how images enter."""
    keeps_cls = hf.vision_feature_select_strategy == "full" and hf.vision_config.model_type == _CLIP
    values: dict[str, Any] = {
        "mm_vision_config": hf.vision_config.to_dict(),
        "mm_vision_select_layer": hf.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if keeps_cls else "patch",
        "mm_projector_type": "mlp2x_gelu",
        "use_mm_proj": True,
    }
    if hf.model_type == "video_llava":
        return values | {"mm_video_config": hf.vision_config.to_dict(), "mm_patch_merge_type": "flat"}
    if hf.model_type == "llava_next":
        # transformers writes (height, width).
        pinpoints = [[width, height] for height, width in hf.image_grid_pinpoints]
        return values | {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": pinpoints,
        }
    return values | {"image_aspect_ratio": _aspect_ratio(folder), "mm_patch_merge_type": "flat"}


def _aspect_ratio(folder: Path) -> str:
    """What the image processor does with images that are not square."""
    settings = processor_settings(folder)
    if settings.get("image_processor_type", "").startswith("LlavaImageProcessor"):
        return "pad" if settings.get("do_pad") else "square"
    # CLIP's own processor can't pad, so that it says nothing about how LLaVA-1.5 was trained: with padding.
    return "pad"
