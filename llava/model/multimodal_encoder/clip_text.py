"""CLIP's text tower and the projections into the space that it shares with images, for reducers that read a text.

Shapes: B texts, N images, P patches, C vision width, E width of the shared space.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from llava.model.weights import check_files, check_json, raise_for_keys, raise_for_nonfinite, without_load_report
from llava.transfer import to_device

# A fast tokenizer sets padding and truncation on itself, which two threads must not do at once.
_TOKENIZING = threading.Lock()


def resolve_text_config(name_or_path: str) -> CLIPTextConfig:
    """The text tower's configuration, from a folder or hub name of a whole CLIP.

    Raises:
        ValueError: nothing there, or a model without CLIP's text tower.
    """
    check_json(name_or_path, "config.json")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # transformers raises its own types for values it can't take
        raise ValueError(f"no model at {name_or_path!r} whose text tower could be read: {error}") from error
    if config.model_type != "clip":
        raise ValueError(
            f"{name_or_path!r} is a {config.model_type!r} model; a reduction that reads the text needs a whole CLIP, "
            "with its text tower. Name one as vision tower"
        )
    config.text_config.projection_dim = config.projection_dim  # the whole model's counts; the other may be a default
    return config.text_config


class _Clip(CLIPModel):
    """CLIP without the scale of its scores: a single number, which ZeRO-3 has no way to hand out."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        del self.logit_scale


class ClipText(nn.Module):
    """Embeds texts, and patches beside them.

    Args:
        config: of the text tower.
        vision_width: C.
    """

    def __init__(self, config: CLIPTextConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision_width, config.projection_dim, bias=False)
        self._tokenizer: Any = None

    def load_weights(self, name_or_path: str) -> None:
        """Read the weights of a whole CLIP, and freeze them.

        Raises:
            ValueError: they do not fit; the keys are listed.
        """
        like = self.text_projection.weight
        check_files(name_or_path)
        with without_load_report():
            clip, info = _Clip.from_pretrained(name_or_path, dtype=like.dtype, output_loading_info=True)
        raise_for_keys(name_or_path, missing=sorted(info["missing_keys"]))
        for name in ("text_model", "text_projection", "visual_projection"):
            module = getattr(clip, name).requires_grad_(False)
            raise_for_nonfinite(name_or_path, module.named_parameters())
            setattr(self, name, module if like.device.type == "meta" else module.to(like.device))

    def embed_texts(self, texts: Sequence[str], name_or_path: str) -> Tensor:
        """[B, E]; texts are cut at the tower's length, 77 tokens for CLIP.

        Args:
            texts: B strings.
            name_or_path: where CLIP's tokenizer is.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(name_or_path)
        length = self.config.max_position_embeddings
        with _TOKENIZING:
            tokens = self._tokenizer(
                list(texts), padding=True, padding_side="right", truncation=True, max_length=length, return_tensors="pt"
            )
        ids = to_device(tokens.input_ids, self.text_projection.weight.device)
        with torch.no_grad():
            # Only the end token is read, which does not see the padding after it: a mask would change nothing, and
            # transformers would wait for the device to look into it.
            pooled = self.text_model(ids).pooler_output
            return self.text_projection(pooled)

    def embed_segments(self, texts: Sequence[str], name_or_path: str) -> list[Tensor]:
        """For each text [S, E], the embeddings of its S stretches of the tower's length, none cut off.

        Each stretch has positions from 0 on, and is pooled as CLIP does: at the end token if it has it, otherwise where
        CLIP's pooling then looks, the first token. Padding has id 0.

        Args:
            texts: B strings.
            name_or_path: where CLIP's tokenizer is.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(name_or_path)
        length, device = self.config.max_position_embeddings, self.text_projection.weight.device
        with _TOKENIZING:
            ids = [self._tokenizer(text, truncation=False).input_ids for text in texts]
        counts = [-(-len(row) // length) for row in ids]
        padded = torch.zeros(sum(counts), length, dtype=torch.int64)
        for row, start in zip(ids, itertools.accumulate([0, *counts]), strict=False):
            padded.view(-1)[start * length : start * length + len(row)] = torch.tensor(row)
        with torch.no_grad():
            # No mask, as in `embed_texts`: only the last segment has padding, after the token that is read.
            pooled = self.text_model(to_device(padded, device)).pooler_output
            return list(self.text_projection(pooled).split(counts))

    def _load_tokenizer(self, name_or_path: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        # From a folder without a tokenizer's files, transformers makes one that knows no word.
        if len(tokenizer) != self.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {name_or_path!r} has {len(tokenizer)} entries, CLIP's text tower "
                f"{self.config.vocab_size}: copy the tokenizer files of the CLIP there"
            )
        return tokenizer

    def embed_patches(self, features: Tensor, norm: nn.Module) -> Tensor:
        """Patches [N, P, C] as CLIP embeds its class token, [N, P, E]; `norm` is the image encoder's last one."""
        with torch.no_grad():
            return self.visual_projection(norm(features))
