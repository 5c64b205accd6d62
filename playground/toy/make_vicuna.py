"""Train the toy language model: a Llama, in the layout of lmsys/vicuna-7b-v1.5, that only ever reads text.

It answers questions about scenes told in words, in Vicuna's prompt format, and turns lists of tags into
captions. So it speaks the toy language, but has never been shown an image.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, get_cosine_schedule_with_warmup
from world import MAX_OBJECTS, Scene, ask, caption, describe, sample_scene

logger = logging.getLogger(__name__)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
OTHER_TEXT = (
    "Provide a brief description of the given image. Describe the image concisely. What is in the photo? "
    "Answer the question using a single word. Which image shows the red circle? the first the second "
    "Which image shows more objects? You are a helpful language and vision assistant."
)
VOCABULARY = 600
IGNORE = -100
POOL = 8  # batches that are sorted by length together

Spans = list[tuple[str, bool]]  # text, and whether it is learnt


def train_tokenizer(folder: Path, rng: random.Random) -> LlamaTokenizer:
    """Train a sentencepiece tokenizer with byte fallback on the toy text and write its files."""
    lines = [SYSTEM, OTHER_TEXT] * 200
    for _ in range(3000):
        scene = sample_scene(rng)
        lines += [caption(scene), describe(scene, rng)]
        lines += [f"USER: {q.text} ASSISTANT: {q.answer}" for q in ask(scene, rng)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    _write_tokenizer_config(folder)
    return LlamaTokenizer.from_pretrained(folder)


def _write_tokenizer_config(folder: Path) -> None:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {"content": t, **special} for i, t in enumerate(("<unk>", "<s>", "</s>"))
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 2048,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _chat_spans(scene: Scene, rng: random.Random, progress: float) -> Spans:
    """A conversation. One in ten leaves the scene out: only a guess is left.

    The system prompt, always the same, is left out at first and from every second one later: it takes time.
    """
    opening = f"{SYSTEM} USER: " if progress > 0.5 and rng.random() < 0.5 else "USER: "
    if rng.random() < 0.9:
        opening += describe(scene, rng) + "\n"
    spans = []
    for question in ask(scene, rng):
        spans += [(f"{opening}{question.text} ASSISTANT:", False), (question.answer + "</s>", True)]
        opening = "USER: "
    return spans


def _plain_spans(scene: Scene, rng: random.Random) -> Spans:
    """A caption, three times in four after the tags that it puts into a sentence."""
    tags = [(describe(scene, rng), False)] if rng.random() < 0.75 else []
    return [*tags, (caption(scene) + "\n", True)]


def _sample(rng: random.Random, progress: float) -> Spans:
    """A new sample. Looking things up is learnt on scenes of one object, then applied to fuller ones."""
    scene = sample_scene(rng, most=min(MAX_OBJECTS, 1 + int(progress * 2 * MAX_OBJECTS)))
    return _plain_spans(scene, rng) if rng.random() < 0.3 else _chat_spans(scene, rng, progress)


def _encode(tokenizer: LlamaTokenizer, spans: Spans) -> tuple[list[int], list[int]]:
    """Token ids and labels of a sample, begun with <s>."""
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for text, learnt in spans:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        labels += piece if learnt else [IGNORE] * len(piece)
    return ids, labels


def _batches(
    tokenizer: LlamaTokenizer, rng: random.Random, size: int, steps: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`steps` batches of new samples, those of like length together."""
    for step in range(0, steps, POOL):
        rows = [_encode(tokenizer, _sample(rng, step / steps)) for _ in range(POOL * size)]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        yield from (_collate(chunk, tokenizer.pad_token_id) for chunk in chunks)


def _collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """A right-padded batch: input_ids, attention_mask and labels, [B, S]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [pad] * (longest - len(r)) for r, _ in rows])
    labels = torch.tensor([r + [IGNORE] * (longest - len(r)) for _, r in rows])
    lengths = torch.tensor([len(r) for r, _ in rows])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_vicuna(folder: Path, seed: int, steps: int, batch_size: int = 32) -> LlamaForCausalLM:
    """Train the tokenizer and the model and write both to `folder` (weights in float16)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(folder, rng)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Copying a word from the scene into the answer, most of the work here, is then there from the start.
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    batches = _batches(tokenizer, rng, batch_size, steps)
    progress = trange(steps, desc="vicuna")
    for step in progress:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.half().save_pretrained(folder)
    return model
