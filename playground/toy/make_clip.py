"""Train the toy vision tower: a CLIP, in the layout of openai/clip-vit-large-patch14-336.

Three losses teach it: CLIP's contrastive one between images and captions; linear heads that read colour,
shape, size and place of the object under each patch off the features LLaVA takes (the input of the last
block); and a pull of the CLS query of the last block towards the patches that show objects, as the attention
of a large CLIP has by itself. The heads are thrown away.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import trange
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
)
from world import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Scene, caption, draw_scene, sample_scene

logger = logging.getLogger(__name__)

PIXELS, PATCH = 112, 14
WIDTH = 128
LEAST_SHARE = 0.12  # of a patch that an object must cover to be what the patch shows
ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "cell": CELLS}
NOTHING = -100
# N images, P patches, C vision width


def train_tokenizer(folder: Path, rng: random.Random) -> CLIPTokenizer:
    """Train a byte-level BPE in CLIP's form (vocab.json, merges.txt) on captions and write its files."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([caption(sample_scene(rng)) for _ in range(2000)], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def _square(image: Image.Image, fill: tuple[int, int, int] | int) -> Image.Image:
    """Pad to a square, the picture in the middle, and scale to PIXELS."""
    side = max(image.size)
    canvas = Image.new(image.mode, (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaling = Image.Resampling.BICUBIC if image.mode == "RGB" else Image.Resampling.NEAREST
    return canvas.resize((PIXELS, PIXELS), scaling)


def _owners(owner: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Which object each patch shows ([P], -1: none) and the share of each patch that objects cover ([P])."""
    side = PIXELS // PATCH
    cut = owner.reshape(side, PATCH, side, PATCH).swapaxes(1, 2).reshape(side * side, -1)
    shares = np.stack([(cut == 1 + i).mean(1) for i in range(len(scene.things))])
    index = np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0), -1)
    return index, shares.sum(0)


class Pictures:
    """Rendered training scenes: uint8 pixels [N, H, W, 3], captions, and labels and coverage [N, P]."""

    def __init__(self, number: int, rng: random.Random, fill: tuple[int, int, int]) -> None:
        self.pixels = np.empty((number, PIXELS, PIXELS, 3), np.uint8)
        patches = (PIXELS // PATCH) ** 2
        self.labels = {name: np.full((number, patches), NOTHING) for name in ATTRIBUTES}
        self.cover = np.zeros((number, patches), np.float32)
        self.background = np.zeros(number, np.int64)
        self.captions = []
        for i in trange(number, desc="pictures"):
            scene = sample_scene(rng)
            image, owner = draw_scene(scene, rng)
            self.pixels[i] = np.asarray(_square(image, fill))
            self.captions.append(caption(scene))
            self.background[i] = list(BACKGROUNDS).index(scene.background)
            self._label(i, scene, np.asarray(_square(owner, 0)))

    def _label(self, i: int, scene: Scene, owner: np.ndarray) -> None:
        index, self.cover[i] = _owners(owner, scene)
        for name, values in ATTRIBUTES.items():
            ids = [t.cell if name == "cell" else values.index(getattr(t, name)) for t in scene.things]
            self.labels[name][i] = np.where(index >= 0, np.asarray(ids)[index], NOTHING)


class Heads(nn.Module):
    """Linear readers of what each patch shows; they exist only while the tower is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleDict({name: nn.Linear(WIDTH, len(v)) for name, v in ATTRIBUTES.items()})
        self.thing = nn.Linear(WIDTH, 2)
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))

    def forward(self, features: Tensor, labels: dict[str, Tensor], background: Tensor) -> dict[str, Tensor]:
        """Losses by name. features [N, P, C], labels [N, P] each, background [N]."""
        losses = {
            name: F.cross_entropy(self.readers[name](features).flatten(0, 1), labels[name].flatten())
            for name in ATTRIBUTES
        }
        is_thing = (labels["color"] >= 0).long()
        losses["thing"] = F.cross_entropy(self.thing(features).flatten(0, 1), is_thing.flatten())
        everywhere = background[:, None].expand_as(is_thing).flatten()
        losses["background"] = F.cross_entropy(self.background(features).flatten(0, 1), everywhere)
        return losses


def cls_attention(model: CLIPModel, hidden: Tensor) -> Tensor:
    """Log attention [N, P] of CLS to patches in the last block, heads as one; hidden [N, 1 + P, C]."""
    block = model.vision_model.encoder.layers[-1]
    normed = block.layer_norm1(hidden)
    query, keys = block.self_attn.q_proj(normed[:, :1]), block.self_attn.k_proj(normed)
    scores = (query @ keys.transpose(1, 2))[:, 0] * WIDTH**-0.5
    return scores.log_softmax(-1)[:, 1:]


def _losses(model: CLIPModel, heads: Heads, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All training losses of a batch."""
    vision = model.vision_model(pixel_values=batch["pixels"], output_hidden_states=True)
    hidden = vision.hidden_states[-2]
    losses = heads(hidden[:, 1:], {name: batch[name] for name in ATTRIBUTES}, batch["background"])
    target = batch["cover"] ** 2
    target = target / target.sum(1, keepdim=True)
    losses["attention"] = -(target * cls_attention(model, hidden)).sum(1).mean()
    text = model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    images = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    texts = F.normalize(model.text_projection(text.pooler_output), dim=-1)
    logits = images @ texts.T * model.logit_scale.exp().clamp(max=100)
    pairs = torch.arange(len(logits))
    losses["clip"] = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return losses


def _batch(
    pictures: Pictures, rows: np.ndarray, tokenizer: CLIPTokenizer, mean: Tensor, std: Tensor
) -> dict[str, Tensor]:
    pixels = torch.from_numpy(pictures.pixels[rows]).permute(0, 3, 1, 2) / 255
    text = tokenizer([pictures.captions[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
    labels = {name: torch.from_numpy(values[rows]) for name, values in pictures.labels.items()}
    return {
        "pixels": (pixels - mean) / std,
        "cover": torch.from_numpy(pictures.cover[rows]),
        "background": torch.from_numpy(pictures.background[rows]),
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask,
        **labels,
    }


def _new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": PIXELS,
        "patch_size": PATCH,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_clip(folder: Path, seed: int, steps: int, number: int = 12000, batch_size: int = 64) -> CLIPModel:
    """Train tokenizer and model and write both, with the image processor, to `folder`, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    tokenizer = train_tokenizer(folder, rng)
    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    processor.save_pretrained(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    pictures = Pictures(number, rng, tuple(int(m * 255) for m in processor.image_mean))
    model, heads = _new_model(tokenizer), Heads()
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    progress = trange(steps, desc="clip")
    for step in progress:
        rows = order.integers(number, size=batch_size)
        losses = _losses(model, heads, _batch(pictures, rows, tokenizer, mean, std))
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix({k: f"{v.item():.2f}" for k, v in losses.items()}, refresh=False)
    model.half().save_pretrained(folder)
    return model
