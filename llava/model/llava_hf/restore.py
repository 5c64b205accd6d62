"""llava-hf checkpoints, and those of any other layout, in LLaVA's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.model.generation_config import writable_generation_config
from llava.model.llava_hf.export import PAD_TOKEN
from llava.model.tokenizer import save_tokenizer


def write_llava(
    folder: Path, model: Any, tokenizer: Any, processor: Any, kept: dict[str, Any] | None, max_shard_size: str
) -> None:
    if kept is not None:
        _restore_vocabulary(model, tokenizer, kept)
    model.generation_config = writable_generation_config(model, model.config.pad_token_id)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder)
    if kept is not None:
        _drop_tokens(folder, kept["tokenizer"]["size"])
    processor.save_pretrained(folder)


def inferred_settings(hf: dict[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """What `_kept_settings` would have kept for a checkpoint of another origin; None: its vocabulary stays.

    `<image>`, `<video>` and the padding token, where they come last, were added for that layout.
    """
    size = hf.get("image_token_index", hf.get("image_token_id"))
    added = {token for token, number in tokenizer.get_vocab().items() if size is not None and number >= size}
    if size is None or not added <= {DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, PAD_TOKEN}:
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
    """Remove the tokens from id `size` on from a tokenizer's files; a tokenizer itself can't forget one."""
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
