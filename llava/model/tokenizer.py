"""Opening and saving the language model's tokenizer, so that a text has the ids of training wherever it is read.

Llama's tokenizer has a switch, `legacy`. With it every piece of text between special tokens begins with a space (`▁`),
without it only the first does. transformers 5 forgets the switch on saving, and takes a file without it as `legacy:
false`, where the releases that LLaVA was trained with took it as true. Here the files decide: what they say, otherwise
how their tokenizer.json splits, otherwise true. Every tokenizer that is opened here is saved with the switch.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.utils import cached_file

_SETTINGS, _FAST, _SENTENCEPIECE = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"


def open_tokenizer(
    path: str | os.PathLike, *, like: str | os.PathLike | None = None, cache_dir: str | None = None, **kwargs: Any
) -> Any:
    """The tokenizer of a checkpoint or language model.

    Args:
        path: folder or hub name.
        like: checkpoint whose `legacy` goes before that of `path`: of the run that goes on, say.
        cache_dir: where files of the hub are kept.
        kwargs: for transformers' from_pretrained.

    Raises:
        ValueError: no tokenizer there, or a file of it is damaged; the file is named.
    """
    path = os.fspath(path)
    files = _read_files(path, cache_dir)
    legacy = None if like is None else _read_files(os.fspath(like), None).legacy
    legacy = files.legacy if legacy is None else legacy
    if files.is_llama and not files.has_prefix and legacy is not False:
        kwargs = {"add_prefix_space": False, **kwargs}  # of the model, which transformers 5 overlooks
    tokenizer = _open(files.cls, path, cache_dir=cache_dir, **kwargs)
    if isinstance(tokenizer, LlamaTokenizer):
        legacy = True if legacy is None else legacy
        if bool(tokenizer.legacy) != legacy:
            tokenizer = _open(files.cls, path, cache_dir=cache_dir, legacy=legacy, **kwargs)
        tokenizer.init_kwargs["legacy"] = legacy  # what save_pretrained writes
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write a tokenizer's files, and the sentencepiece model, which LLaVA's own code reads it from."""
    tokenizer.save_pretrained(folder)
    copy_sentencepiece(tokenizer, folder)


def copy_sentencepiece(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write the sentencepiece model that a tokenizer was opened from, which transformers 5 leaves out."""
    source, target = getattr(tokenizer, "vocab_file", None), Path(folder, _SENTENCEPIECE)
    if source and Path(source).name == _SENTENCEPIECE and not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _open(cls: Any, path: str, **kwargs: Any) -> Any:
    try:
        tokenizer = cls.from_pretrained(path, **kwargs)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"the tokenizer of {path} does not open: {str(error).splitlines()[0]}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{path} holds no tokenizer: copy that of the language model there (e.g. {_SENTENCEPIECE})")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} has no token that ends an answer (eos_token): its {_SETTINGS} is missing or not "
            "whole; copy it from the language model"
        )
    return tokenizer


@dataclass(frozen=True)
class _Files:
    """What lies in a folder: tokenizer_config.json, tokenizer.json, and whether there is a sentencepiece model.

    `has_prefix` says whether tokenizer.json, or without one that model, puts a space in front of a text.
    """

    settings: dict[str, Any]
    fast: dict[str, Any] | None
    has_sentencepiece: bool
    has_prefix: bool

    @property
    def legacy(self) -> bool | None:
        """What they say of the switch; None: nothing."""
        said = self.settings.get("legacy")
        return bool(said) if said is not None else _prefixes_all(self.fast or {})

    @property
    def cls(self) -> Any:
        """The class that opens them. For some models AutoTokenizer reads sentencepiece's file without its prefix."""
        alone = self.fast is None and self.has_sentencepiece
        return LlamaTokenizer if alone and self.is_llama else AutoTokenizer

    @property
    def is_llama(self) -> bool:
        """Whether they are of Llama's tokenizer."""
        name: str = self.settings.get("tokenizer_class") or "LlamaTokenizer"
        return name.removesuffix("Fast") == "LlamaTokenizer"


def _read_files(path: str, cache_dir: str | None) -> _Files:
    """Look at all files, so that a damaged one is named.

    Raises:
        ValueError: a damaged file.
    """
    settings = _read_json(_find(path, _SETTINGS, cache_dir))
    fast = _read_json(_find(path, _FAST, cache_dir))
    sentencepiece = _find(path, _SENTENCEPIECE, cache_dir)
    if fast is None:
        has_prefix = sentencepiece is None or _puts_prefix(sentencepiece)
    else:
        has_prefix = not _only_marks_spaces(fast)
    return _Files(settings or {}, fast, sentencepiece is not None, has_prefix)


def _find(path: str, name: str, cache_dir: str | None) -> str | None:
    try:
        found: str | None = cached_file(path, name, cache_dir=cache_dir)
    except OSError:  # no such file, or no way to the hub: opening the tokenizer says which
        return None
    return found


def _read_json(file: str | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}; copy it again from where the model comes from") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; copy it again from where the model comes from")
    return content


def _puts_prefix(file: str) -> bool:
    """Whether a sentencepiece model puts a space in front of a text.

    Raises:
        ValueError: it is none.
    """
    try:
        pieces = SentencePieceProcessor(model_file=file).encode("a", out_type=str)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is no sentencepiece model: it is damaged, or a pointer of Git LFS; copy it again from where the "
            "model comes from"
        ) from error
    return bool(pieces[0].startswith("▁"))


def _prefixes_all(fast: dict[str, Any]) -> bool | None:
    """Whether the tokenizer in a tokenizer.json puts a space in front of every piece of text; None: of none."""
    parts = _parts(fast.get("normalizer"), "normalizers")
    if any(part.get("type") == "Prepend" for part in parts):
        return True
    for part in _parts(fast.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":  # releases before `prepend_scheme` knew "always" only
            return {"always": True, "first": False}.get(part.get("prepend_scheme", "always"))
    return None


def _only_marks_spaces(fast: dict[str, Any]) -> bool:
    """Whether a tokenizer.json writes `▁` for spaces, and puts none in front of anything."""
    kinds = [part.get("type") for part in _parts(fast.get("normalizer"), "normalizers")]
    return kinds == ["Replace"] and not fast.get("pre_tokenizer")


def _parts(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if not isinstance(step, dict):
        return []
    return step[key] if step.get("type") == "Sequence" else [step]
