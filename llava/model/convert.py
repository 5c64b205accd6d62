"""Rewrite checkpoints: ours as llava-hf, so that transformers, vLLM and SGLang can serve it, and back.

Shapes: V rows of the vocabulary, D language-model width.
"""

from __future__ import annotations

import copy
import json
import logging
import os
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
)

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Template, get_template
from llava.files import check_apart, new_folder, places_read
from llava.mm_utils import get_image_side, parse_grid_pinpoints
from llava.model.builder import lasting_name, load_pretrained_model, local_folder
from llava.model.hf_layout import KEPT, to_hf_name
from llava.model.tokenizer import copy_sentencepiece, save_tokenizer
from llava.reduction.config import LEGACY_TRIM_KEY, ReductionConfig

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
_TEMPLATES = {"llama": "v1", "mistral": "mistral_instruct", "qwen2": "qwen", "qwen3": "qwen"}
_ROW_MULTIPLE = 64  # llava-hf pads the vocabulary to this, for the speed of matrix products


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = "hf",
    *,
    model_base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    drop_reduction: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another layout. The target appears under its name only when it is complete.

    Args:
        source: folder or hub name, of any layout that `load_pretrained_model` opens; LoRA weights are merged.
        target: folder to write.
        to: "hf" for LlavaForConditionalGeneration, or LlavaNextForConditionalGeneration where images are tiled;
            "llava" for a full checkpoint in LLaVA's layout, with the vision tower's weights in it.
        model_base: as for `load_pretrained_model`.
        vision_tower: as for `load_pretrained_model`; to "llava" from hf, the name to write as mm_vision_tower.
        template: to hf, name of the prompt template to write as chat template; default: the one that LLaVA trains
            the kind of language model with.
        dtype: of the written weights; default: the checkpoint's.
        drop_reduction: to hf, leave out the reduction of visual tokens, which that layout can't express: the model
            then gets all tokens, other than it was trained with.
        max_shard_size: largest size of one weight file.
        overwrite: replace a target that this program wrote; what someone else put there stays.

    Returns:
        The target.

    Raises:
        ValueError: the target exists, may not be replaced, or holds what is read; or the checkpoint can't be opened or
            expressed in that layout.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"to={to!r}: choose hf or llava")
    folder, origin = Path(target), local_folder(source)
    check_apart(folder, "target", places_read(origin, model_base, vision_tower))
    raw = _config_json(origin)
    hf = raw if "text_config" in raw else None
    if to == "hf" and hf is not None:
        raise ValueError(f"{os.fspath(source)} has the llava-hf layout already")
    with new_folder(folder, overwrite=overwrite) as staging:
        tokenizer, model, processor, _ = load_pretrained_model(
            origin, model_base, device="cpu", dtype=dtype, vision_tower=None if hf else vision_tower, merge_lora=True
        )
        model.config.mm_vision_tower = _tower_name(raw, vision_tower if hf else None, model.config.mm_vision_tower)
        if to == "hf":
            _write_hf(staging, model, tokenizer, processor, template, drop_reduction, max_shard_size)
        else:
            kept = None if hf is None else hf.get(KEPT) or _inferred_settings(hf, tokenizer)
            _write_llava(staging, model, tokenizer, processor, kept, max_shard_size)
    logger.info("%s: written in the layout %s", folder, to)
    return folder


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tower_name(raw: dict[str, Any], wanted: str | os.PathLike | None, opened: str) -> str:
    """The tower's name to write: the one asked for or the source's own, rather than where its weights were read."""
    kept = raw.get(KEPT, {}).get("config", raw)
    return lasting_name(wanted or kept.get("mm_vision_tower") or opened)


# Ours to hf


def _write_hf(
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
    tokens = [AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    marked = bool(getattr(model.config, "mm_use_im_start_end", False))
    chat = chat_template(prompt, marked, _line_break_after(DEFAULT_IM_END_TOKEN if marked else "", tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    config = _hf_config(model, tokenizer, anyres)
    setattr(config, KEPT, kept)
    weights = _hf_weights(model, config.text_config.vocab_size)
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    config.save_pretrained(folder)
    _generation_config(model, config.pad_token_id).save_pretrained(folder)
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
    left_out = {"reduction", LEGACY_TRIM_KEY, "mm_vision_config", "mm_hidden_size", "model_type"}
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
    own, tower = model.config, model.get_vision_tower()
    rows = max(own.vocab_size, len(tokenizer))
    keep_all = tower.select_feature == "cls_patch" or not tower.has_cls
    values = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
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
    if not anyres:
        return LlavaConfig(**values)
    # transformers writes (height, width).
    pinpoints = [[height, width] for width, height in parse_grid_pinpoints(own.image_grid_pinpoints)]
    return LlavaNextConfig(**values, image_grid_pinpoints=pinpoints)


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
    return {to_hf_name(name): value.contiguous() for name, value in weights.items()}


def _extended(weight: Tensor, rows: int) -> Tensor:
    """[V, D] to [rows, D]; new rows are the mean of the old ones."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _write_processor(folder: Path, model: Any, tokenizer: Any, processor: Any, config: Any, chat: str) -> None:
    tower = model.get_vision_tower()
    anyres = isinstance(config, LlavaNextConfig)
    image_processor = _hf_image_processor(processor, model.config, config.image_grid_pinpoints if anyres else None)
    tokenizer.padding_side = "left"  # batches are for generation there
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


def _line_break_after(marker: str, tokenizer: Any) -> str:
    """What to write between an image and the text below it, so that the line break has the ids of training.

    Training tokenizes the text after an image by itself, so it may begin with a space that the tokenizer puts in front.
    A tokenizer that puts it only in front of a whole prompt needs to be given it.
    """
    trained = tokenizer(f"{marker}\n", add_special_tokens=False).input_ids
    for text in ("\n", " \n"):
        if tokenizer(DEFAULT_IMAGE_TOKEN + marker + text, add_special_tokens=False).input_ids[1:] == trained:
            return text
    return "\n"


def chat_template(template: Template, mm_use_im_start_end: bool = False, line_break: str = "\n") -> str:
    """A Jinja chat template that writes what `Template.render` does, with `line_break` after each image.

    It takes transformers' messages; a first one of the role system replaces the template's own system prompt, and the
    images of a message come first, each on a line of its own, as in LLaVA. A prompt ends where the model begins, with
    or without `add_generation_prompt`: LLaVA's templates have no other end of a question.
    """
    image = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        image = f"{DEFAULT_IM_START_TOKEN}{image}{DEFAULT_IM_END_TOKEN}"
    first = "question_open + head" if template.system_in_question else "head + question_open"
    names = ("system_open", "system_close", "round_open", "question_open", "question_close", "answer_lead")
    texts = {name: getattr(template, name) for name in names}
    texts |= {"answer_end": template.answer_close + template.after_answer, "image": image + line_break}
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in texts.items()) + (
        _CHAT.replace("FIRST", first).replace("SYSTEM", json.dumps(template.system))
    )


_CHAT = """\
{%- macro text(message) -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images(message) -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- image -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = text(messages[0]) -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM -%}{%- set turns = messages -%}
{%- endif -%}
{%- set head = system_open + system + system_close if system else '' -%}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{- answer_lead + text(message) + answer_end -}}
{%- else -%}
{{- (FIRST) if loop.first else round_open + question_open -}}
{{- images(message) + text(message) + question_close -}}
{%- endif -%}
{%- endfor -%}
"""


# hf, and any other layout, to ours


def _write_llava(
    folder: Path, model: Any, tokenizer: Any, processor: Any, kept: dict[str, Any] | None, max_shard_size: str
) -> None:
    if kept is not None:
        _restore_vocabulary(model, tokenizer, kept)
    model.generation_config = _generation_config(model, model.config.pad_token_id)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder)
    if kept is not None:
        _drop_tokens(folder, kept["tokenizer"]["size"])
    processor.save_pretrained(folder)


def _inferred_settings(hf: dict[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """What `_kept_settings` would have kept for a checkpoint of another origin; None: its vocabulary stays.

    `<image>` and the padding token, where they come last, were added for that layout.
    """
    size = hf.get("image_token_index", hf.get("image_token_id"))
    added = {token for token, number in tokenizer.get_vocab().items() if size is not None and number >= size}
    if size is None or not added <= {DEFAULT_IMAGE_TOKEN, PAD_TOKEN}:
        return None
    pad = tokenizer.unk_token if tokenizer.pad_token in added else tokenizer.pad_token  # as LLaVA pads
    return {
        "vocab_size": size,
        "pad_token_id": None if pad is None else tokenizer.convert_tokens_to_ids(pad),
        "tokenizer": {"size": size, "pad_token": pad, "padding_side": "right", "chat_template": None},
    }


def _restore_vocabulary(model: Any, tokenizer: Any, kept: dict[str, Any]) -> None:
    """Cut the model back to the rows that it had before `<image>` came."""
    model.resize_token_embeddings(kept["vocab_size"])
    model.config.pad_token_id = kept["pad_token_id"]
    for name in ("pad_token", "padding_side", "chat_template"):
        setattr(tokenizer, name, kept["tokenizer"][name])


def _drop_tokens(folder: Path, size: int) -> None:
    """Take the tokens from id `size` on out of a tokenizer's files; a tokenizer itself can't forget one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"the tokenizer writes no {path.name}, so that {DEFAULT_IMAGE_TOKEN} can't be taken out of it")
    content = json.loads(path.read_text(encoding="utf-8"))
    dropped = {token["content"] for token in content["added_tokens"] if token["id"] >= size}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(_without(settings, dropped), indent=2, ensure_ascii=False), encoding="utf-8")


def _without(value: Any, dropped: set[str]) -> Any:
    """JSON data without the entries that name one of these tokens."""

    def names(entry: Any) -> bool:
        return (entry.get("content") if isinstance(entry, dict) else entry) in dropped

    if isinstance(value, dict):
        return {k: _without(v, dropped) for k, v in value.items() if isinstance(v, list) or not names(v)}
    if isinstance(value, list):
        return [_without(v, dropped) for v in value if isinstance(v, list) or not names(v)]
    return value


def _generation_config(model: Any, pad_token_id: int | None) -> Any:
    generation = copy.deepcopy(model.generation_config)
    generation.pad_token_id = pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        # Vicuna's sets a temperature without sampling, which transformers refuses to write.
        generation.do_sample = True
    return generation
