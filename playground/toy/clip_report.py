"""Ask the held-out questions about toy clips and print what was measured, as Markdown.

    python playground/toy/clip_report.py --frames DIR --one-frame DIR [--data DIR] [--budget 16] [--methods none,fastv]

Two tables, for docs/video.md: a model trained with frames, and one trained with one, asked with frames, with one and
with none; and every method on the first, without training: `--budget` visual tokens of a frame for a layer of the
language model. Methods with weights of their own have to be trained, and are left out with those that refuse.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

import torch
from clips import BEATS, CATEGORIES, CONTROL, KINDS, OUTPUT
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava.data import build_prompt_ids
from llava.eval.accuracy import Score, score, spread
from llava.eval.questions import Question, read_jsonl
from llava.messages import set_up_messages
from llava.mm_utils import process_video
from llava.model.builder import load_pretrained_model
from llava.reduction import available, build
from llava.reduction.registry import method_class, site_of

TEMPLATE = "vicuna_v1"
BATCH = 50
LONGEST = 6  # tokens of an answer
Method = dict[str, Any]
# What is told in place of a budget: to one that can only come near it, with 15, and to those inside the language model,
# which has 4 layers. These drop after the first; counts (1 here) are set to what stays of the budget's frames.
NEAREST: dict[str, Method] = {"prumerge_plus": {"tokens": 7}}
INSIDE: dict[str, Method] = {
    "fastv": {"layer": 1, "tokens": 1},
    "dart": {"layer": 1, "tokens": 1, "image_pivots": 2, "text_pivots": 2},
    "sparsevlm": {"layers": [1], "keep": [1]},
    "vscan_drop": {"layers": [1], "keep": [1]},
}


@dataclass(frozen=True)
class Asked:
    """A question with its clip, [F, 3, H, W]; None: asked without."""

    question: Question
    clip: Tensor | None


@dataclass(frozen=True)
class Row:
    """What became of the questions, and the visual tokens of a clip that a layer of the language model processed."""

    score: Score
    a_layer: float


class Model:
    """A checkpoint, with what it takes to ask it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(str(folder), torch_dtype=torch.float32)
        self.patches = self.model.get_model().get_vision_tower().num_patches

    def read(self, data: Path, num_frames: int) -> list[Asked]:
        """The held-out questions, with so many frames of their clips."""
        rows = [row for _, row in read_jsonl(data / "heldout.jsonl")]
        clips: dict[str, Tensor | None] = dict.fromkeys([row["video"] for row in rows])
        for name in clips if num_frames else ():
            clips[name] = process_video(data / "videos" / name, self.processor, self.model.config, num_frames)
        asked = []
        for row in rows:
            question = Question(row["question_id"], row["text"], answer=row["answer"], category=row["category"])
            asked.append(Asked(question, clips[row["video"]]))
        return asked

    def ask(self, asked: Sequence[Asked], reduction: Method | None = None) -> Row:
        """Ask with a method, or none."""
        self.model.set_reduction("none")  # or a method of the projector would stay beside the next one
        self.model.set_reduction(reduction, keep_projector=True)
        batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        answers = [row for batch in batches for row in self._answer(batch)]
        found = score([one.question for one in asked], answers)
        frames = 0 if asked[0].clip is None else len(asked[0].clip)
        return Row(found, self._a_layer(fmean(found.after), frames))

    @torch.no_grad()
    def _answer(self, batch: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        texts, clips = [one.question.text for one in batch], [one.clip for one in batch if one.clip is not None]
        prompts = [
            build_prompt_ids(one.question.text, self.tokenizer, TEMPLATE, 0, num_videos=int(one.clip is not None))
            for one in batch
        ]
        ids = pad_sequence(prompts, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True, padding_side="left")
        spliced = self.model.splice_images(ids, mask, videos=clips, texts=texts, left=True)
        new = self.model.generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            image_index=spliced.image_index,
            plan=spliced.plan,
            max_new_tokens=LONGEST,
            do_sample=False,
        )
        visual = (spliced.image_index >= 0).sum(dim=1).tolist()
        for one, answer, count in zip(batch, self.tokenizer.batch_decode(new, True), visual, strict=True):
            yield {
                "question_id": one.question.question_id,
                "text": answer.strip(),
                "metadata": {"visual_tokens": [(0 if one.clip is None else self.patches * len(one.clip), count)]},
            }

    def _a_layer(self, entered: float, frames: int) -> float:
        """Visual tokens of a clip that a layer of the language model processes, in the mean, of those that entered."""
        decoder = self.model.get_model().decoder_reducer
        if decoder is None or not frames:
            return entered
        pools = frames if decoder.pool == "frame" else 1
        layers = self.model.config.num_hidden_layers
        return float(pools * sum(decoder.layer_counts(layers, round(entered / pools))) / layers)


def variants(name: str, budget: float) -> dict[str, Method]:
    """The ways in which a method takes clips, by what the table calls them."""
    cls, method = method_class(name), {"name": name, **NEAREST.get(name, {"budget": budget})}
    if site_of(cls) == "decoder":
        method = {"name": name, **INSIDE.get(name, {})}
        counts = {key: method[key] for key in ("tokens", "keep") if key in method}
        each = {key: [budget] * len(value) if isinstance(value, list) else budget for key, value in counts.items()}
        whole = {key: [budget * BEATS] * len(v) if isinstance(v, list) else budget * BEATS for key, v in counts.items()}
        return {f"`{name}`": {**method, **whole}, f"`{name}`, `pool: frame`": {**method, **each, "pool": "frame"}}
    found = {f"`{name}`": method} if cls.budget_choices(budget) else {}
    if getattr(cls, "ranks_frames", False):
        found[f"`{name}`, `frames: joint`"] = {**method, "frames": "joint"}
    if _finds_its_count(name):
        found[f"`{name}`, its own count"] = {"name": name}
    return found


def _finds_its_count(name: str) -> bool:
    try:
        return build(name).is_adaptive
    except ValueError:  # it has options without a default
        return False


def ask_methods(model: Model, asked: list[Asked], names: list[str], budget: int) -> tuple[dict[str, Row], str]:
    """A row for every method in every variant, and the names of those left out, each with the reason."""
    every: dict[str, Method | None] = {"all tokens": None}
    for name in names:
        every |= variants(name, budget)
    rows, left_out = {}, []
    for label, method in tqdm(every.items(), desc="methods", leave=False, disable=None):
        try:
            rows[label] = model.ask(asked, method)
        except (ValueError, NotImplementedError) as error:
            left_out.append(f"- {label}: {shorten(str(error), 200)}")
    return rows, "\n".join(left_out)


def of_kind(kind: str, asked: list[Asked]) -> list[Asked]:
    """The questions of a type."""
    return [one for one in asked if one.question.category == kind]


def table(rows: dict[str, Row], first: str) -> str:
    """Tokens of a clip that enter the language model, the mean of its layers, and accuracy in percent, in Markdown."""
    header = [first, "tokens a clip", "a layer", *CATEGORIES, f"all but {CONTROL}"]
    lines = [header, ["---"] * len(header)]
    for label, row in rows.items():
        score = row.score
        right, asked = (sum(counts[kind] for kind in KINDS) for counts in (score.right, score.asked))
        cells = [f"{100 * score.accuracy(kind):.0f}" for kind in CATEGORIES]
        lines.append([label, spread(score.after), f"{row.a_layer:.0f}", *cells, f"{100 * right / asked:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="the model trained with frames")
    parser.add_argument("--one-frame", type=Path, help="the model trained with one frame")
    parser.add_argument("--data", type=Path, default=OUTPUT)
    parser.add_argument("--num-frames", type=int, default=BEATS)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--limit", type=int, default=50, help="questions of each type that methods are asked")
    parser.add_argument("--methods", help="names with commas between; default: all")
    flags = parser.parse_args(argv)
    set_up_messages(logging.WARNING)
    model = Model(flags.frames)
    counts = dict.fromkeys((flags.num_frames, 1, 0))
    read = {count: model.read(flags.data, count) for count in counts}
    rows = {f"trained with {flags.num_frames} frames, asked with {n}": model.ask(read[n]) for n in counts}
    if flags.one_frame:
        rows["trained with 1 frame, asked with 1"] = Model(flags.one_frame).ask(read[1])
    asked = next(iter(rows.values())).score.asked
    print(f"Held-out questions: {', '.join(f'{asked[kind]} {kind}' for kind in CATEGORIES)}; right answers in %.\n")
    print(table(rows, "model"), "\n")
    names = flags.methods.split(",") if flags.methods else [name for names in available().values() for name in names]
    few = [one for kind in CATEGORIES for one in of_kind(kind, read[flags.num_frames])[: flags.limit]]
    by_method, left_out = ask_methods(model, few, names, flags.budget)
    print(f"Methods, on {len(few) // len(CATEGORIES)} questions of each type.\n")
    print(table(by_method, f"method, {flags.budget} tokens a frame"), f"\n\nLeft out:\n\n{left_out}")


if __name__ == "__main__":
    main()
