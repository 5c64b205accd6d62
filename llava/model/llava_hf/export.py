"""Our checkpoints as llava-hf.

Shapes: V rows of the vocabulary, D language-model width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    AddedToken,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
)

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.conversation import get_template
from llava.mm_utils import get_image_side, parse_grid_pinpoints
from llava.model.generation_config import writable_generation_config
from llava.model.llava_hf.chat_template import chat_template, line_break_after
from llava.model.llava_hf.opening import KEPT, to_hf_name
from llava.model.tokenizer import copy_sentencepiece
from llava.reduction.config import ReductionConfig
from llava.reduction.released import KEYS

PAD_TOKEN = "<pad>"
_TEMPLATES = {"llama": "v1", "mistral": "mistral_instruct", "qwen2": "qwen", "qwen3": "qwen"}
# What a tower computes by; the rest of its configuration tells how it was trained.
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
_ROW_MULTIPLE = 64  # llava-hf pads the vocabulary to this, for the speed of matrix products


def write_hf(
    folder: Path,
    model: Any,
    tokenizer: Any,
    processor: Any,
    template: str | None,
    drop_reduction: bool,
    max_shard_size: str,
) -> None:
    anyres = _check_expressible(model.config, drop_reduction)
    model.set_reduction(None, keep_projector=True)
    prompt = get_template(template or _TEMPLATES[_language_config_class(model.config).model_type])
    kept = _kept_settings(model.config, tokenizer)
    has_two_towers = model.get_model().video_tower is not None
    markers = [DEFAULT_IMAGE_TOKEN, *([DEFAULT_VIDEO_TOKEN] if has_two_towers else [])]
    tokens = [AddedToken(marker, special=True, normalized=False) for marker in markers]
    tokenizer.add_tokens(tokens, special_tokens=True)
    marked = bool(getattr(model.config, "mm_use_im_start_end", False))
    chat = chat_template(prompt, marked, line_break_after(DEFAULT_IM_END_TOKEN if marked else "", tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    config = _hf_config(model, tokenizer, anyres)
    setattr(config, KEPT, kept)
    weights = _hf_weights(model, config.text_config.vocab_size)
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    config.save_pretrained(folder)
    writable_generation_config(model, config.pad_token_id).save_pretrained(folder)
    _write_processor(folder, model, tokenizer, processor, config, chat)
    copy_sentencepiece(tokenizer, folder)


def _check_expressible(config: Any, drop_reduction: bool) -> bool:
    """Whether images are tiled, if the hf layouts can say all that this config says.

    Raises:
        ValueError: they can't; the key is named.
    """
    reduction = ReductionConfig.of_model(config)
    if reduction and not drop_reduction:
        raise ValueError(
            f"the llava-hf layouts can't express this model's reduction of visual tokens ({reduction.to_dict()}); pass "
            "drop_reduction=True (--drop-reduction) to write the model as one that gets all tokens"
        )
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind != "mlp2x_gelu":
        raise ValueError(f"mm_projector_type={kind!r}: the llava-hf layouts have mlp2x_gelu only")
    ratio = getattr(config, "image_aspect_ratio", None) or "square"
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    if getattr(config, "mm_video_tower", None) and (ratio == "anyres" or merge != "flat"):
        raise ValueError(
            f"image_aspect_ratio={ratio!r} with mm_patch_merge_type={merge!r}: video_llava has neither tiles nor ends "
            "of rows, but square or pad with flat"
        )
    if ratio == "anyres" and merge == "spatial_unpad":
        if getattr(config, "mm_vision_select_feature", "patch") != "patch":
            raise ValueError("mm_vision_select_feature='cls_patch': llava_next lays out tiles without a class token")
        return True
    if ratio in ("square", "pad") and merge in ("flat", "spatial"):
        return False
    raise ValueError(
        f"image_aspect_ratio={ratio!r} with mm_patch_merge_type={merge!r}: the llava-hf layouts have square or pad "
        "with flat (llava), and anyres with spatial_unpad (llava_next)"
    )


def _kept_settings(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the way back needs and the hf layout has no place for."""
    left_out = {"reduction", *KEYS, "mm_vision_config", "mm_video_config", "mm_hidden_size", "model_type"}
    own = config.to_dict()
    return {
        "config": {k: own[k] for k in sorted(set(own) - set(_language_config_class(config)().to_dict()) - left_out)},
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "tokenizer": {
            "size": len(tokenizer),
            "pad_token": tokenizer.pad_token,
            "padding_side": tokenizer.padding_side,
            "chat_template": tokenizer.chat_template,
        },
    }


def _language_config_class(config: Any) -> Any:
    """The configuration class of the language model alone."""
    return type(config).__bases__[-1]


def _hf_config(model: Any, tokenizer: Any, anyres: bool) -> Any:
    own, tower, frames = model.config, model.get_vision_tower(), model.get_model().video_tower
    rows = max(own.vocab_size, len(tokenizer))
    keep_all = tower.select_feature == "cls_patch" or not tower.has_cls
    values = {
        "architectures": [f"{_hf_kind(model, anyres)}ForConditionalGeneration"],
        "vision_config": tower.config.to_dict(),
        "text_config": _text_config(model, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE),
        "image_token_index": tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN),
        "image_seq_length": tower.num_patches + int(tower.has_cls and keep_all),
        "vision_feature_layer": getattr(own, "mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if keep_all else "default",
        "tie_word_embeddings": own.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": model.dtype,
    }
    if frames is not None:
        ours, theirs = ({name: getattr(each.config, name) for name in _ARCHITECTURE} for each in (tower, frames))
        if ours != theirs:
            raise ValueError(f"video_llava has one configuration for both towers, and they have {ours} and {theirs}")
        video = {"video_token_index": tokenizer.convert_tokens_to_ids(DEFAULT_VIDEO_TOKEN)}
        return VideoLlavaConfig(**values, **video, video_seq_length=8 * (frames.num_patches + 1))
    if not anyres:
        return LlavaConfig(**values)
    # transformers writes (height, width).
    pinpoints = [[height, width] for width, height in parse_grid_pinpoints(own.image_grid_pinpoints)]
    return LlavaNextConfig(**values, image_grid_pinpoints=pinpoints)


def _hf_kind(model: Any, anyres: bool) -> str:
    """The first part of the names of transformers' classes."""
    if model.get_model().video_tower is not None:
        return "VideoLlava"
    return "LlavaNext" if anyres else "Llava"


def _text_config(model: Any, rows: int) -> dict[str, Any]:
    cls = _language_config_class(model.config)
    own = model.config.to_dict()
    values = {name: own[name] for name in cls().to_dict() if name in own and name != "_name_or_path"}
    _, language_model = type(model).__bases__  # LLaVA's mixin comes first
    return values | {
        "model_type": cls.model_type,
        "architectures": [language_model.__name__],
        "vocab_size": rows,
        "dtype": model.dtype,
    }


def _hf_weights(model: Any, rows: int) -> dict[str, Tensor]:
    """The model's weights under their names there, the vocabulary extended to `rows`."""
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = _extended(weights[name], rows)
    has_two_towers = model.get_model().video_tower is not None
    return {to_hf_name(name, has_two_towers): value.contiguous() for name, value in weights.items()}


def _extended(weight: Tensor, rows: int) -> Tensor:
    """[V, D] to [rows, D]; new rows are the mean of the old ones."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _write_processor(folder: Path, model: Any, tokenizer: Any, processor: Any, config: Any, chat: str) -> None:
    tower = model.get_vision_tower()
    anyres = isinstance(config, LlavaNextConfig)
    image_processor = _hf_image_processor(processor, model.config, config.image_grid_pinpoints if anyres else None)
    tokenizer.padding_side = "left"  # batches are for generation there
    if model.get_model().video_tower is not None:
        _write_video_processor(folder, tokenizer, processor, config, chat)
        return
    cls = LlavaNextProcessor if anyres else LlavaProcessor
    cls(
        image_processor,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.has_cls),
        chat_template=chat,
    ).save_pretrained(folder)
    # Releases of transformers before 5 look for it in a file of its own.
    image_processor.save_pretrained(folder)


def _write_video_processor(folder: Path, tokenizer: Any, processor: Any, config: Any, chat: str) -> None:
    """Video-LLaVA's, as files: transformers' class for clips can't be made without torchvision."""
    settings = {k: v for k, v in processor.to_dict().items() if not k.endswith("_type")}
    VideoLlavaImageProcessor(**settings).save_pretrained(folder)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    clips = {key: settings[key] for key in ("size", "crop_size", "image_mean", "image_std")}
    clips["video_processor_type"] = "VideoLlavaVideoProcessor"
    values = {
        "processor_class": "VideoLlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,
        "image_token": DEFAULT_IMAGE_TOKEN,
        "video_token": DEFAULT_VIDEO_TOKEN,
    }
    for name, content in (("video_preprocessor_config.json", clips), ("processor_config.json", values)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _hf_image_processor(processor: Any, config: Any, pinpoints: list | None) -> Any:
    """llava-hf's image processor with the settings of the tower's."""
    settings = {k: v for k, v in processor.to_dict().items() if not k.endswith("_type")}
    if not settings.get("do_center_crop"):
        side = get_image_side(processor)
        # LlavaNext's processor takes a tile's side from here, cropping or not.
        settings |= {"do_center_crop": False, "crop_size": {"height": side, "width": side}}
    if pinpoints is not None:
        return LlavaNextImageProcessorPil(**settings | {"image_grid_pinpoints": pinpoints, "do_pad": True})
    return LlavaImageProcessorPil(**settings | {"do_pad": getattr(config, "image_aspect_ratio", None) == "pad"})
