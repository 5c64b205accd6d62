"""Small llava-hf checkpoints with random weights, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AddedToken,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tests.tiny_models import PATCH, SIDE, vision_config

WORDS = [
    "what",
    "is",
    "the",
    "red",
    "blue",
    "thing",
    "left",
    "right",
    "of",
    "a",
    "big",
    "small",
    "circle",
    "square",
    "where",
    "how",
    "many",
    "are",
    "there",
    "?",
    ".",
    ":",
]
SIZES = {"square": (90, 90), "wide": (170, 64), "tall": (60, 210)}  # (width, height)
# (height, width), as transformers has them; not symmetric, so that swapped sides would show.
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [56, 224], [168, 112]]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with coarse random structure."""
    pixels = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def word_tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """A word is a token, wherever it stands, so that both sides read a prompt alike."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    if "<pad>" in added:
        fast.pad_token = "<pad>"
    return fast


def text_config(backbone: str, vocab_size: int) -> dict[str, Any]:
    """Configuration of a small language model."""
    return {
        "model_type": backbone,
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def randomize(model: torch.nn.Module, std: float = 0.08) -> None:
    """Weights large enough that every part shows in the logits, small enough that rounding does not grow."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, std, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)


def hf_model(kind: str, backbone: str = "llama", tower: str = "clip", tied: bool = False, **settings: Any) -> Any:
    """A LlavaForConditionalGeneration ("llava") or LlavaNextForConditionalGeneration ("llava_next")."""
    image_token = len(WORDS) + 3
    text = text_config(backbone, vocab_size=64) | {"tie_word_embeddings": tied}
    values = {
        "vision_config": vision_config(tower).to_dict(),
        "text_config": text,
        "image_token_index": image_token,
        "pad_token_id": image_token + 1,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "tie_word_embeddings": tied,
        **settings,
    }
    if kind == "llava":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**values))
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**{"image_grid_pinpoints": PINPOINTS, **values}))
    randomize(model)
    return model.eval()


def hf_processor(kind: str, tower: str = "clip", strategy: str = "default", do_pad: bool = True) -> Any:
    """The processor of such a model."""
    size: dict[str, Any] = {"crop_size": {"height": SIDE, "width": SIDE}}
    if tower == "clip":
        size["size"] = {"shortest_edge": SIDE}
    else:
        size |= {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "image_mean": [0.5, 0.5, 0.5]}
        strategy = "full"
    image_processor: Any = LlavaImageProcessorPil(do_pad=do_pad, **size)
    if kind == "llava_next":
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **size)
    cls = LlavaProcessor if kind == "llava" else LlavaNextProcessor
    return cls(
        image_processor,
        word_tokenizer("<image>", "<pad>"),
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "clip"),
    )


def hf_folder(folder: Path, kind: str, backbone: str = "llama", tower: str = "clip", **settings: Any) -> Path:
    """Model and processor as transformers writes them."""
    do_pad = settings.pop("do_pad", True)
    hf_model(kind, backbone, tower, **settings).save_pretrained(folder)
    strategy = settings.get("vision_feature_select_strategy", "default")
    hf_processor(kind, tower, strategy, do_pad).save_pretrained(folder)
    return folder
