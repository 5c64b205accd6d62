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
from typing import Any

import torch
from clips import BEATS, CATEGORIES, OUTPUT
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava.data import build_prompt_ids
from llava.eval.accuracy import Score, score, spread
from llava.eval.questions import Question, read_jsonl
from llava.messages import set_up_messages
from llava.mm_utils import process_video
from llava.model.builder import load_pretrained_model
from llava.reduction import available
from llava.reduction.registry import method_class, site_of

TEMPLATE = "vicuna_v1"
BATCH = 50
LONGEST = 6  # tokens of an answer
Method = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question with its clip, [F, 3, H, W]; None: asked without."""

    question: Question
    clip: Tensor | None


class Model:
    """A checkpoint, with what it takes to ask it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(str(folder), torch_dtype=torch.float32)

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

    def ask(self, asked: Sequence[Asked], reduction: Method | None = None) -> Score:
        """Answers, scored, with the visual tokens of the clips before and after the reduction."""
        self.model.set_reduction(reduction)
        batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        rows = [row for batch in batches for row in self._answer(batch)]
        return score([one.question for one in asked], rows)

    @torch.no_grad()
    def _answer(self, batch: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        clips, texts = [one.clip for one in batch if one.clip is not None], [one.question.text for one in batch]
        marks = [int(one.clip is not None) for one in batch]
        prompts = [
            build_prompt_ids(text, self.tokenizer, TEMPLATE, 0, num_videos=count)
            for text, count in zip(texts, marks, strict=True)
        ]
        ids = pad_sequence(prompts, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True, padding_side="left")
        tokens = self.model.generate(
            ids, attention_mask=mask, videos=clips, texts=texts, max_new_tokens=LONGEST, do_sample=False
        )
        told = [text for text, count in zip(texts, marks, strict=True) if count]
        pairs = self.model.count_visual_tokens(None, texts=told, videos=clips) if clips else [(0, 0)] * len(batch)
        answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for one, answer, pair in zip(batch, answers, pairs, strict=True):
            yield {
                "question_id": one.question.question_id,
                "text": answer.strip(),
                "metadata": {"visual_tokens": [pair]},
            }


def variants(name: str, budget: float) -> dict[str, Method]:
    """The ways in which a method takes clips, by what the table calls them."""
    cls, method = method_class(name), {"name": name, "budget": budget}
    site = site_of(cls)
    if site == "encoder" and getattr(cls, "ranks_frames", False):
        return {f"`{name}`": method, f"`{name}`, `frames: joint`": {**method, "frames": "joint"}}
    if site == "decoder":
        return {f"`{name}`": method, f"`{name}`, `pool: frame`": {**method, "pool": "frame"}}
    return {f"`{name}`": method}


def methods_asked(model: Model, asked: list[Asked], names: list[str], budget: float) -> tuple[dict[str, Score], str]:
    """Scores of every method in every variant, and the names of those left out, each with the reason."""
    every = {label: method for name in names for label, method in variants(name, budget).items()}
    scores: dict[str, Score] = {"all tokens": model.ask(asked, None)}
    left_out = []
    for label, method in tqdm(every.items(), desc="methods", leave=False, disable=None):
        try:
            scores[label] = model.ask(asked, method)
        except (ValueError, NotImplementedError) as error:
            left_out.append(f"- {label}: {error}")
    model.model.set_reduction(None)
    return scores, "\n".join(left_out)


def table(scores: dict[str, Score], first: str) -> str:
    """A row for each score, in Markdown: tokens of a clip that enter the language model, and accuracy in percent."""
    header = [first, "tokens a clip", *CATEGORIES, "in time"]
    lines = [header, ["---"] * len(header)]
    for label, one in scores.items():
        in_time = [kind for kind in CATEGORIES if kind != CATEGORIES[-1]]
        mean = sum(one.right[kind] for kind in in_time) / sum(one.asked[kind] for kind in in_time)
        lines.append(
            [label, spread(one.after), *(f"{100 * one.accuracy(kind):.0f}" for kind in CATEGORIES), f"{100 * mean:.1f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="the model trained with frames")
    parser.add_argument("--one-frame", type=Path, help="the model trained with one frame")
    parser.add_argument("--data", type=Path, default=OUTPUT)
    parser.add_argument("--num-frames", type=int, default=BEATS)
    parser.add_argument("--budget", type=float, default=16)
    parser.add_argument("--methods", help="names with commas between; default: all")
    flags = parser.parse_args()
    set_up_messages(logging.WARNING)
    model = Model(flags.frames)
    counts = dict.fromkeys((flags.num_frames, 1, 0))
    read = {count: model.read(flags.data, count) for count in counts}
    scores = {f"trained with {flags.num_frames} frames, asked with {n}": model.ask(read[n]) for n in counts}
    if flags.one_frame:
        scores["trained with 1 frame, asked with 1"] = Model(flags.one_frame).ask(read[1])
    asked = next(iter(scores.values())).asked
    print(f"Held-out questions: {', '.join(f'{asked[kind]} {kind}' for kind in CATEGORIES)}; right answers in %.\n")
    print(table(scores, "model"), "\n")
    names = flags.methods.split(",") if flags.methods else [name for names in available().values() for name in names]
    by_method, left_out = methods_asked(model, read[flags.num_frames], names, flags.budget)
    print(table(by_method, f"method, budget {flags.budget:g} a frame"), f"\n\nLeft out:\n\n{left_out}")


if __name__ == "__main__":
    main()
