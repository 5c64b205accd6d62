"""Open a checkpoint of any layout. Its files say what it is; its path says nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.files import ADAPTER_CONFIG, NON_LORA_FILE, PROJECTOR_FILES, adapter_file, projector_file
from llava.model.language_model.families import llava_class_for
from llava.model.multimodal_encoder.processor import processor_settings
from llava.model.projector_method import method_of_weights
from llava.model.tokenizer import open_tokenizer
from llava.model.weights import (
    WEIGHT_FILES,
    parse_dtype,
    raise_for_keys,
    read_json,
    read_weights,
    strip_prefixes,
    weights_mark,
)
from llava.reduction.config import ReductionConfig

logger = logging.getLogger(__name__)

LLAVA_1_5 = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
}
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
MERGED_KEY = "merged_adapters"  # of config.json: marks of the adapters that were added to the weights
# Patterns that bitsandbytes' modules are matched with, from the start of the name.
NOT_QUANTIZED = [r"model\.mm_projector\w*", r"model\.query_abstractor", r"model\.(vision|video)_tower", "lm_head"]


def load_pretrained_model(
    model_path: str | os.PathLike,
    model_base: str | os.PathLike | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    vision_tower: str | os.PathLike | None = None,
    reduction: ReductionConfig | dict | str | None = None,
    attn_implementation: str | None = None,
    merge_lora: bool = False,
    use_flash_attn: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """Open a LLaVA checkpoint for inference.

    Layouts: a full checkpoint, with or without the vision tower's weights; a LoRA folder or a projector-only folder on
    `model_base`; a llava-hf checkpoint (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration).

    Args:
        model_path: folder or hub name.
        model_base: language model (or LLaVA checkpoint) that a LoRA or projector-only folder belongs to; for LoRA the
            default is the base that the adapter names.
        model_name: not needed, kept for LLaVA's callers.
        load_8bit: quantize the language model with bitsandbytes.
        load_4bit: the same in 4 bits (nf4).
        device_map: spread over devices as transformers does, instead of `device`; where both are given, a `device`
            other than cuda counts, as in LLaVA.
        device: default: cuda where there is one, otherwise cpu.
        dtype: default: the checkpoint's.
        vision_tower: folder or hub name in place of the config's `mm_vision_tower`.
        reduction: None for what config.json says; otherwise what `ReductionConfig.parse` reads, "none" for all tokens.
        attn_implementation: eager, sdpa or flash_attention_2; default: transformers' choice.
        merge_lora: add a LoRA folder's weights to the base's. Faster; the sum is rounded to `dtype`, so that answers
            differ slightly from those that the adapter was trained to give.
        use_flash_attn: LLaVA's word for attn_implementation="flash_attention_2".
        torch_dtype: LLaVA's word for `dtype`; also a name such as "float16".
        kwargs: for transformers' from_pretrained; of LLaVA-NeXT's words `overwrite_config`, settings in place of those
            in config.json, and `multimodal`, which is always so.

    Returns:
        tokenizer, model in eval mode, image processor, and the context length in tokens.

    Raises:
        ValueError: nothing to open, a base is missing, or weights do not fit; files and keys are named. Or an argument
            of another type, or a device that is not there.
    """
    del model_name
    for name, path in (("model_path", model_path), ("model_base", model_base), ("vision_tower", vision_tower)):
        if not (isinstance(path, str | os.PathLike) and os.fspath(path)) and (path is not None or name == "model_path"):
            raise ValueError(f"{name}={path!r}: expected a folder, or the name of a model of the hub")
    _check_dtype(dtype)
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other: choose one")
    place = _device(device)
    folder = local_folder(model_path)
    dtype = dtype or (parse_dtype(torch_dtype) if isinstance(torch_dtype, str) else torch_dtype)
    kwargs = {k: v for k, v in kwargs.items() if k != "multimodal"} | {"dtype": dtype or "auto"}
    if use_flash_attn or kwargs.pop("use_flash_attention_2", False):
        attn_implementation = "flash_attention_2"
    if attn_implementation is not None:
        if not isinstance(attn_implementation, str):
            raise ValueError(f"attn_implementation={attn_implementation!r}: expected eager, sdpa or flash_attention_2")
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise ValueError(
                "attn_implementation='flash_attention_2' needs a GPU and flash-attn: pip install 'llava[flash]', "
                "or use 'sdpa'"
            )
        kwargs["attn_implementation"] = attn_implementation
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = _quantization(load_4bit, dtype)
    if device_map or load_8bit or load_4bit:
        one_device = device not in (None, "cuda") or not device_map
        kwargs["device_map"] = {"": place} if one_device else device_map
    tower = None if vision_tower is None else lasting_name(vision_tower)
    checkpoint = _open(folder, model_base, tower, merge_lora, kwargs)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    _match_vocabulary(model, tokenizer)
    if reduction is not None:
        model.set_reduction(reduction, keep_projector=True)
    if "device_map" not in kwargs:
        model.to(place)
    model.eval()
    model.tokenizer = tokenizer
    return tokenizer, model, _image_processor(model, folder), context_length(model.config)


@dataclass
class _Checkpoint:
    model: Any
    tokenizer: Any


def _open(
    folder: Path, model_base: str | os.PathLike | None, tower: str | None, merge: bool, kwargs: dict[str, Any]
) -> _Checkpoint:
    """Tell the layout by the files and open it."""
    has_weights = any((folder / name).is_file() for name in WEIGHT_FILES)
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_lora(folder, model_base, tower, merge, kwargs)
    if not has_weights and projector_file(folder).is_file():
        return _open_projector(folder, model_base, tower, kwargs)
    if not has_weights:
        raise ValueError(
            f"{folder} holds no checkpoint: expected one of {', '.join(WEIGHT_FILES)}, an {ADAPTER_CONFIG} (LoRA) "
            f"or a {' or '.join(PROJECTOR_FILES)} (projector only)"
        )
    raw = read_json(folder / "config.json")
    if "text_config" in raw and "vision_config" in raw:
        from llava.model.llava_hf.opening import open_hf_checkpoint

        return _Checkpoint(open_hf_checkpoint(folder, tower, kwargs), _tokenizer(folder))
    if model_base is not None:
        logger.warning("%s is a full checkpoint: model_base=%s is not read", folder, model_base)
    cls, config = _llava_config(folder, kwargs.pop("overwrite_config", None))
    model = cls.from_pretrained(str(folder), config=config, vision_tower=tower, **kwargs)
    if model.get_vision_tower() is None:
        raise ValueError(
            f"{folder} is a bare language model: its config.json has no mm_vision_tower. Pass it as model_base, with a "
            "LoRA or projector-only folder as model_path"
        )
    return _Checkpoint(model, _tokenizer(folder))


def _open_lora(
    folder: Path, model_base: str | os.PathLike | None, tower: str | None, merge: bool, kwargs: dict[str, Any]
) -> _Checkpoint:
    """A PEFT adapter and the weights that were trained beside it, on their base."""
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = model_base or adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} is a LoRA folder whose adapter names no base; pass model_base=")
    adapters = read_weights(adapter_file(folder))
    base_config = read_json(local_folder(base) / "config.json")
    raise_if_merged(folder, adapters, base_config, base)
    model = _open_on_base(folder / NON_LORA_FILE, base, tower, kwargs)
    if merge:
        setattr(model.config, MERGED_KEY, [*(base_config.get(MERGED_KEY) or []), weights_mark(adapters)])
    return _Checkpoint(_add_adapter(model, folder, adapters, merge), _tokenizer(folder, base))


def _add_adapter(model: Any, folder: Path, weights: dict[str, Tensor], merge: bool) -> Any:
    """Put a PEFT adapter into the modules that its weights name.

    Those names say more than `target_modules`, whose short names match modules of the vision tower too.

    Raises:
        ValueError: settings that PEFT can't take, or weights for modules that the model does not have.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    # Releases before transformers 5 had one module more between the tower and its encoder.
    weights = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in weights.items()}
    targets = {k.removeprefix("base_model.model.").split(".lora_")[0] for k in weights if ".lora_" in k}
    raise_for_keys(folder, unexpected=sorted(targets - {name for name, _ in model.named_modules()}))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.target_modules = sorted(targets)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        result = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # PEFT checks little of what it reads
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder}: {ADAPTER_CONFIG} and the adapter's weights can't be put into the model; check that both are "
            f"of one run ({reason[:400]})"
        ) from error
    raise_for_keys(
        folder,
        missing=[key for key in result.missing_keys if ".lora_" in key],
        unexpected=list(result.unexpected_keys),
    )
    return adapted.merge_and_unload() if merge else adapted.base_model.model


def raise_if_merged(
    folder: str | os.PathLike, adapter: Mapping[str, Tensor], base_config: Mapping[str, Any], base: str | os.PathLike
) -> None:
    """Raise a ValueError where a base has taken up an adapter already: it would count twice.

    Args:
        folder: of the adapter.
        adapter: its weights.
        base_config: config.json of the base.
        base: what the base is called.
    """
    if weights_mark(adapter) in (base_config.get(MERGED_KEY) or []):
        raise ValueError(
            f"{os.fspath(folder)} has been merged into {os.fspath(base)} already and would count twice: use that "
            "checkpoint alone, or the adapter with the base that it was trained on"
        )


def _open_projector(
    folder: Path, model_base: str | os.PathLike | None, tower: str | None, kwargs: dict[str, Any]
) -> _Checkpoint:
    """A pretrained projector on its language model."""
    config = folder / "config.json"
    base = model_base or (read_json(config).get("_name_or_path") if config.is_file() else None)
    if not base:
        raise ValueError(f"{folder} holds a projector only; pass the language model as model_base=")
    model = _open_on_base(projector_file(folder), base, tower, kwargs)
    return _Checkpoint(model, _tokenizer(folder, base))


def _open_on_base(file: Path, base: str | os.PathLike, tower: str | None, kwargs: dict[str, Any]) -> Any:
    """The base with the projector weights in `file`, and the configuration beside it."""
    folder, weights, base_folder = file.parent, read_weights(file), local_folder(base)
    cls, config = _config_on_base(folder, base_folder, tower, weights, kwargs.pop("overwrite_config", None))
    embeddings = {k: v for k, v in weights.items() if k.endswith("embed_tokens.weight")}
    vocabulary = config.vocab_size
    config.vocab_size = _llava_config(base_folder)[1].vocab_size
    named = strip_prefixes(weights, ["base_model.model."])
    projector = {k: v for k, v in named.items() if k not in strip_prefixes(embeddings, ["base_model.model."])}
    model = cls.from_pretrained(
        str(base_folder),
        config=config,
        vision_tower=tower,
        projector_weights=projector,
        projector_origin=file,
        **kwargs,
    )
    if vocabulary != config.vocab_size:
        model.resize_token_embeddings(vocabulary)
    for key, value in strip_prefixes(embeddings, ["base_model.model."]).items():
        _fill_embeddings(model.get_parameter(key), value, file)
    return model


def _config_on_base(
    folder: Path, base: Path, tower: str | None, weights: dict[str, Tensor], overwrite: Mapping[str, Any] | None
) -> tuple[Any, PreTrainedConfig]:
    """What the config.json of `folder` describes; without one, the base with the released STF, if `weights` are that.

    STF's release of the pretrained projector has no config.json. The projector's weights tell the method, and the rest
    is as in LLaVA-1.5, on which it was trained.
    """
    if (folder / "config.json").is_file() or method_of_weights(weights) is None:
        return _llava_config(folder, overwrite)
    if tower is None:
        raise ValueError(f"{folder} has no config.json to name a vision tower; pass vision_tower=")
    cls, config = _llava_config(base, overwrite)
    settings = {**LLAVA_1_5, "mm_vision_tower": tower}
    logger.info("%s has no config.json; settings of LLaVA-1.5: %s", folder, settings)
    for name, value in settings.items():
        setattr(config, name, value)
    return cls, config


def _fill_embeddings(parameter: Tensor, value: Tensor, file: Path) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"{file}: trained embeddings of shape {tuple(value.shape)}, but its config.json asks for "
            f"{tuple(parameter.shape)}"
        )
    parameter.data.copy_(value)


def _llava_config(folder: Path, overwrite: Mapping[str, Any] | None = None) -> tuple[Any, PreTrainedConfig]:
    """The model class and configuration that config.json describes; `overwrite` goes before its settings."""
    raw = {**read_json(folder / "config.json"), **(overwrite or {})}
    return read_llava_config(raw, folder / "config.json")


def read_llava_config(raw: dict[str, Any], origin: object) -> tuple[Any, PreTrainedConfig]:
    """The model class and configuration for the content of a config.json.

    Args:
        raw: the content.
        origin: file or hub name that it comes from, for messages.

    Raises:
        ValueError: no model_type, one that LLaVA has no class for, or values that its configuration can't take.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{origin} has no model_type")
    cls = llava_class_for(model_type)
    try:
        return cls, cls.config_class.from_dict({k: v for k, v in raw.items() if k != "model_type"})
    except Exception as error:  # transformers raises its own types for values it can't take
        raise ValueError(f"{origin} has a value that {cls.config_class.__name__} can't take: {error}") from error


def lasting_name(path: str | os.PathLike) -> str:
    """A folder's absolute path, which config files can name for readers in any folder; a hub name as it is."""
    return str(Path(path).absolute()) if Path(path).is_dir() else os.fspath(path)


def local_folder(path: str | os.PathLike) -> Path:
    """The folder itself, or where the hub's copy lies."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=_HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is neither a folder nor a model of the hub that can be reached from here: {error}"
        ) from error


def _tokenizer(*folders: str | os.PathLike) -> Any:
    """The tokenizer of the first folder that has one."""
    for folder in folders:
        local = local_folder(folder)
        if any((local / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
            return open_tokenizer(local)
    raise ValueError(
        f"no tokenizer in {', '.join(str(folder) for folder in folders)}: copy that of the language model there"
    )


def _match_vocabulary(model: Any, tokenizer: Any) -> None:
    """Add the marker tokens that the model was trained with, where the tokenizer's files lack them."""
    config = model.config
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(config, "mm_use_im_patch_token", False) else []
    if getattr(config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokens and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def _image_processor(model: Any, folder: Path) -> Any:
    """The checkpoint's own image processor where it has one, otherwise the vision tower's."""
    tower = model.get_vision_tower()
    if processor_settings(folder):
        tower.processor_path = str(folder)
    return tower.image_processor


def context_length(config: Any) -> int:
    """Longest sequence in tokens that the model was made for."""
    for name in ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 2048


def _device(given: str | torch.device | None) -> torch.device:
    """The device asked for; by default cuda where there is one, otherwise cpu.

    Raises:
        ValueError: no such device, here or anywhere.
    """
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises its own types: AssertionError without CUDA, for one
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={given!r} can't be used here ({reason}): expected cpu, cuda or cuda:0, say"
        ) from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no weights: expected cpu, cuda or cuda:0, say")
    return device


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a type of floats, such as torch.float16; None: the checkpoint's")


def _quantization(four_bit: bool, dtype: torch.dtype | None) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("load_4bit and load_8bit need bitsandbytes: pip install 'llava[qlora]'") from error
    from transformers import BitsAndBytesConfig

    if not four_bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype or torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
