"""Train the toy language model: a Llama, in the layout of lmsys/vicuna-7b-v1.5, that only ever reads text.

It answers questions about scenes told in words, in Vicuna's prompt format, and turns lists of tags into
captions. So it speaks the toy language, but has never been shown an image.

In some samples each note about the scene takes one position, the sum of its words' embeddings: a visual token,
too, says several things at once, and a model of this size does not learn to read such a token in passing.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import corpus
import sentencepiece
import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, get_cosine_schedule_with_warmup
from world import ask, caption, describe, sample_scene

logger = logging.getLogger(__name__)

OTHER_TEXT = (
    "Provide a brief description of the given image. Describe the image concisely. What is in the photo? "
    "Answer the question using a single word. Which image shows the red circle? the first the second "
    "Which image shows more objects? You are a helpful language and vision assistant."
)
VOCABULARY = 600


def train_tokenizer(folder: Path, rng: random.Random) -> LlamaTokenizer:
    """Train a sentencepiece tokenizer with byte fallback on the toy text and write its files."""
    lines = [corpus.SYSTEM, OTHER_TEXT] * 200
    for _ in range(3000):
        scene = sample_scene(rng)
        lines += [caption(scene), describe(scene, rng)]
        lines += [f"USER: {q.text} ASSISTANT: {q.answer}" for q in ask(scene, rng)]
    text = folder / "corpus.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",  # with the next line: as Llama's, text is kept as it is
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    _write_tokenizer_config(folder)
    return LlamaTokenizer.from_pretrained(folder)


def _write_tokenizer_config(folder: Path) -> None:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": t, **special} for i, t in enumerate(("<unk>", "<s>", "</s>"))},
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


def bag_embeddings(embed: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, S, D] of bags of ids [B, S, W], empty slots -1; a bag's sum is scaled to one word's length."""
    filled = (ids >= 0).unsqueeze(-1)
    count = filled.sum(dim=2).clamp(min=1)
    return (embed(ids.clamp(min=0)) * filled).sum(dim=2) * count**-0.5


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
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        initializer_range=0.08,  # about width^-0.5; the usual 0.02 learns several times slower at this width
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Copying a word from the scene into the answer, most of the work here, is then there from the start.
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    batches = corpus.batches(tokenizer, rng, batch_size, steps)
    progress = trange(steps, desc="vicuna")
    for step in progress:
        batch = next(batches)
        embeds = bag_embeddings(model.get_input_embeddings(), batch.ids)
        loss = model(inputs_embeds=embeds, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.half().save_pretrained(folder)
    return model
