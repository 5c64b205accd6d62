"""Tokenizer and model of a run, with the right weights frozen and LLaVA's keys in the config."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from llava.files import adapter_file
from llava.model.builder import MERGED_KEY, NOT_QUANTIZED, lasting_name, raise_if_merged, read_llava_config
from llava.model.language_model.families import llava_class_for
from llava.model.tokenizer import open_tokenizer
from llava.model.weights import check_json, read_json, read_weights
from llava.reduction import ReductionConfig
from llava.reduction.base import FIXED_WEIGHTS
from llava.train.checkpoints.saving import RunKind, load_adapter, part_of
from llava.train.settings.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_pinpoints,
)
from llava.train.settings.parsing import Arguments
from llava.video import Sampling

logger = logging.getLogger(__name__)

# LLaVA's defaults for a bare language model; a LLaVA checkpoint brings its own settings.
VISION_DEFAULTS = {
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
}


def run_kind(arguments: Arguments) -> RunKind:
    """What this run trains and writes."""
    if arguments.model.tune_mm_mlp_adapter:
        return RunKind.PROJECTOR
    return RunKind.LORA if arguments.training.lora_enable else RunKind.FULL


def read_config(arguments: Arguments) -> Any:
    """The configuration of the language model or checkpoint that the run starts from.

    Fills in the vision settings that the command line left open: the checkpoint's, otherwise LLaVA's defaults.

    Raises:
        ValueError: no such model, no LLaVA on this kind of model, or no vision tower named anywhere.
    """
    model, data = arguments.model, arguments.data
    adopt_adapter_settings(arguments)
    raw = _config_dict(arguments)
    check_not_merged(arguments, raw)
    if "text_config" in raw and "vision_config" in raw:
        raise ValueError(f"{model.model_name_or_path} has the llava-hf layout: convert it first, with llava convert")
    _, config = read_llava_config(raw, f"--model_name_or_path {model.model_name_or_path}: config.json")
    is_llava = getattr(config, "mm_vision_tower", None) is not None
    if not is_llava and not model.vision_tower:
        raise ValueError(
            f"{model.model_name_or_path} is a language model without a vision tower: name one with --vision_tower"
        )
    model.vision_tower = lasting_name(model.vision_tower or config.mm_vision_tower)
    video_tower = model.video_tower or getattr(config, "mm_video_tower", None)
    model.video_tower = None if video_tower is None else lasting_name(video_tower)
    model.model_name_or_path = lasting_name(str(model.model_name_or_path))  # adapters name it as their base
    for name, default in VISION_DEFAULTS.items():
        if getattr(model, name) is None:
            setattr(model, name, getattr(config, name, default) if is_llava else default)
    frames = Sampling.of_model(config, data.num_frames, data.video_fps, data.max_frames)
    data.num_frames, data.video_fps, data.max_frames = frames.num_frames, frames.fps, frames.max_frames
    data.image_aspect_ratio = data.image_aspect_ratio or getattr(config, "image_aspect_ratio", "square")
    data.image_grid_pinpoints = data.image_grid_pinpoints or getattr(config, "image_grid_pinpoints", None)
    if data.image_aspect_ratio == "anyres" and not data.image_grid_pinpoints:
        raise ValueError("--image_aspect_ratio anyres needs --image_grid_pinpoints: the resolutions to choose from")
    return config


def adopt_adapter_settings(arguments: Arguments) -> None:
    """Give the run the method and the vision settings that the adapter of `lora_weight_path` was trained with.

    Raises:
        ValueError: the flags ask for others.
    """
    model, folder = arguments.model, arguments.training.lora_weight_path
    file = Path(folder or "", "config.json")
    if not folder or not file.is_file():
        return
    kept = read_json(file)
    theirs, own = ReductionConfig.of_model(SimpleNamespace(**kept)), ReductionConfig.parse(model.reduction)
    if model.reduction is None and theirs:
        model.reduction = json.dumps(theirs.to_dict())
        logger.info("%s was trained with reduction=%s, which this run takes over", folder, model.reduction)
    elif any(getattr(own, site) != method for site, method in theirs.to_dict().items()):
        raise ValueError(
            f"--lora_weight_path {folder} was trained with reduction={theirs.to_dict()}, and --reduction asks for "
            f"{own.to_dict() or 'none'}: leave --reduction out"
        )
    for name in VISION_DEFAULTS.keys() & kept.keys():
        if getattr(model, name) is None:
            setattr(model, name, kept[name])
        elif getattr(model, name) != kept[name]:
            raise ValueError(
                f"--lora_weight_path {folder} was trained with {name}={kept[name]}, and --{name} asks for "
                f"{getattr(model, name)}: leave --{name} out"
            )


def check_not_merged(arguments: Arguments, raw: dict[str, Any]) -> None:
    """Refuse an adapter to go on from whose weights the base has taken up already.

    Args:
        arguments: of the run.
        raw: config.json of the base.
    """
    folder = arguments.training.lora_weight_path
    file = adapter_file(Path(folder or ""))
    if folder and raw.get(MERGED_KEY) and file.is_file():
        raise_if_merged(folder, read_weights(file), raw, arguments.model.model_name_or_path or "")


def _config_dict(arguments: Arguments) -> dict[str, Any]:
    path = arguments.model.model_name_or_path
    check_json(path or "", "config.json", arguments.training.cache_dir)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, cache_dir=arguments.training.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {path}: {error}") from error
    if not raw.get("model_type"):
        raise ValueError(f"--model_name_or_path {path}: there is no config.json with a model_type")
    return raw


def load_tokenizer(arguments: Arguments, checkpoint: str | None = None) -> Any:
    """The language model's tokenizer, with a padding token.

    Args:
        arguments: of the run.
        checkpoint: that the run goes on from, with the ids that it began with.
    """
    tokenizer = open_tokenizer(
        str(arguments.model.model_name_or_path),
        like=checkpoint,
        cache_dir=arguments.training.cache_dir,
        model_max_length=arguments.training.model_max_length,
        padding_side="right",
    )
    # LLaVA pads with unk where there is one; padded places are masked, so the choice does not matter otherwise.
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(arguments: Arguments, config: Any, tokenizer: Any) -> Any:
    """The model to train: vision modules in place, LLaVA's keys in its config, the rest frozen.

    Args:
        arguments: of the run, with settings filled in by `read_config`.
        config: from `read_config`.
        tokenizer: gets marker tokens where the run asks for them.

    Returns:
        The model, or PEFT's wrapper of it where LoRA is trained.

    Raises:
        ValueError: weights do not fit, or hold NaN or infinity; they are listed.
    """
    model_args, data_args, training = arguments.model, arguments.data, arguments.training
    model = llava_class_for(config.model_type).from_pretrained(
        model_args.model_name_or_path,
        config=config,
        vision_tower=model_args.vision_tower,
        cache_dir=training.cache_dir,
        dtype=loading_dtype(arguments),
        attn_implementation=training.attn_implementation,
        **quantization(training),
    )
    model.get_model().initialize_vision_modules(model_args)
    model.initialize_vision_tokenizer(model_args, tokenizer)
    model.tokenizer = tokenizer
    write_llava_config(model.config, model_args, data_args, training, tokenizer)
    select_trainable(model, arguments)
    if training.lora_enable:
        model = add_lora(model, training)
    set_trainable_dtype(model, training)
    return model


def loading_dtype(arguments: Arguments) -> torch.dtype:
    """Type of the weights as they are read.

    DeepSpeed keeps float32 copies of what it trains, so it can be given bfloat16. Without it, weights that are
    trained must be float32 themselves: in bfloat16 small updates would be rounded away.
    """
    training = arguments.training
    trains_all = run_kind(arguments) is RunKind.FULL
    return torch.bfloat16 if training.bf16 and (training.deepspeed or not trains_all) else torch.float32


def compute_dtype(training: TrainingArguments) -> torch.dtype:
    """Type that matrix products are computed in."""
    return torch.float16 if training.fp16 else torch.bfloat16 if training.bf16 else torch.float32


def quantization(training: TrainingArguments) -> dict[str, Any]:
    """Arguments of from_pretrained that quantize the language model for QLoRA; none with 16 bits."""
    if training.bits == 16:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=training.bits == 4,
        load_in_8bit=training.bits == 8,
        llm_int8_skip_modules=NOT_QUANTIZED,
        bnb_4bit_compute_dtype=compute_dtype(training),
        bnb_4bit_use_double_quant=training.double_quant,
        bnb_4bit_quant_type=training.quant_type,
    )
    return {"quantization_config": config, "device_map": {"": training.device}}


def write_llava_config(
    config: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training: TrainingArguments,
    tokenizer: Any,
) -> None:
    """Keep in the model's config what LLaVA keeps there."""
    values = {
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "image_grid_pinpoints": parse_pinpoints(data_args.image_grid_pinpoints),
        "num_frames": data_args.num_frames,
        "video_fps": data_args.video_fps,
        "max_frames": data_args.max_frames,
        "tokenizer_padding_side": tokenizer.padding_side,
        "tokenizer_model_max_length": tokenizer.model_max_length,
        "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "unfreeze_mm_vision_tower": model_args.unfreeze_mm_vision_tower,
        "mm_use_im_start_end": model_args.mm_use_im_start_end,
        "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
        "mm_projector_lr": training.mm_projector_lr,
        "mm_vision_tower_lr": training.mm_vision_tower_lr,
    }
    for name, value in values.items():
        setattr(config, name, value)


def select_trainable(model: Any, arguments: Arguments) -> None:
    """Set requires_grad of every weight.

    Pretraining trains the projector, finetuning the language model too, LoRA the projector (its adapters are to
    come). The vision tower is trained only if asked for, and as far as the projector reads it. A reducer's weights
    keep what the reducer chose.
    """
    model_args = arguments.model
    kind = run_kind(arguments)
    trains_llm = kind is RunKind.FULL and not model_args.freeze_backbone
    read = tower_weights_read(model) if model_args.unfreeze_mm_vision_tower else set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trained = {
            "language_model": trains_llm,
            "projector": not arguments.training.freeze_mm_mlp_adapter and not name.endswith(FIXED_WEIGHTS),
            "vision_tower": name in read,
            "reducer": parameter.requires_grad,
        }[part]
        parameter.requires_grad_(trained and parameter.is_floating_point())
    if model_args.mm_use_im_start_end and kind is not RunKind.FULL:
        # The marker tokens' embeddings are new: they must be learned, and kept with what is learned.
        model.get_input_embeddings().requires_grad_(True)


def tower_weights_read(model: Any) -> set[str]:
    """Names of the weights of the vision tower that the projector's input depends on.

    The others get no gradient: blocks after the last one that is read, the pooled output, CLIP's text tower. DDP
    would wait for theirs, and DeepSpeed would let weight decay shrink them.
    """
    inner = model.get_model()
    used: set[int] = set()
    for tower in filter(None, (inner.get_vision_tower(), inner.video_tower)):
        encoder = tower.vision_tower
        blocks = range(inner.tower_depth_read, tower.depth)
        unread = {"encoder.layers." + str(i) for i in blocks} | {"post_layernorm", "head"}
        idle = {id(p) for name in unread if _has(encoder, name) for p in encoder.get_submodule(name).parameters()}
        used |= {id(parameter) for parameter in encoder.parameters()} - idle
    return {name for name, parameter in model.named_parameters() if id(parameter) in used}


def _has(module: nn.Module, name: str) -> bool:
    return any(known == name for known, _ in module.named_modules())


def linear_layer_names(model: Any) -> list[str]:
    """Last names of the linear layers in the language model's blocks, sorted: what LoRA adapts."""
    linear = (name for name, module in model.get_model().layers.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in linear})


def add_lora(model: Any, training: TrainingArguments) -> Any:
    """Wrap the model in PEFT, with adapters on all linear layers of the language model's blocks."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = [name for name, _ in model.named_parameters() if part_of(name) != "language_model" or name in trained]
    if training.bits != 16:
        checkpointing = bool(training.gradient_checkpointing)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        # The vision tower has layers of the same names. (PEFT has exclude_modules too; older releases refuse it.)
        target_modules=rf"model\.layers\..*\.({'|'.join(linear_layer_names(model))})",
        lora_dropout=training.lora_dropout,
        bias=training.lora_bias,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name in others:  # PEFT freezes all but its adapters, and trains all biases where lora_bias says "all"
        model.get_parameter(name).requires_grad_(name in trained)
    if training.bits != 16:
        cast_frozen(adapted, compute_dtype(training))
    if training.lora_weight_path:
        load_adapter(adapted, training.lora_weight_path)
    return adapted


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the frozen weights that are not quantized the type of the products: vision tower, embeddings, head.

    PEFT has made them float32, for which they take twice the memory. The language model's norms stay so, as in LLaVA.
    """
    for name, parameter in model.named_parameters():
        is_norm = part_of(name) == "language_model" and "norm" in name
        if parameter.is_floating_point() and not parameter.requires_grad and not is_norm:
            parameter.data = parameter.data.to(dtype)


def set_trainable_dtype(model: nn.Module, training: TrainingArguments) -> None:
    """Give trained weights the type that the optimizer needs; see `loading_dtype`.

    A vision tower that is trained takes it as a whole: its last block, which is not, may score what the others give.
    """
    dtype = compute_dtype(training) if training.deepspeed else torch.float32
    of_tower = [parameter for name, parameter in model.named_parameters() if part_of(name) == "vision_tower"]
    whole = {id(p) for p in of_tower} if any(p.requires_grad for p in of_tower) else set()
    for parameter in model.parameters():
        if (parameter.requires_grad or id(parameter) in whole) and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Number of trained weights in each part of the model, slices of ZeRO-3 counted whole."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "adapters" if "lora_" in name else part_of(name)
            counts[part] = counts.get(part, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return counts
