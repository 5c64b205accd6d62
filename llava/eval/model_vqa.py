"""Answer questions about images with a checkpoint, in batches: LLaVA's `model_vqa`.

python -m llava.eval.model_vqa --model-path CHECKPOINT --image-folder DIR --question-file Q --answers-file A
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava.conversation import get_template
from llava.data.images import IMAGE_ACCESS, check_image_exists, load_image, locate_image, open_image
from llava.data.preprocessing import build_prompt_ids
from llava.eval.questions import Question, get_chunk, read_jsonl, read_questions
from llava.files import check_apart, check_writable
from llava.lock import lock
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.reduction.config import join_pyramiddrop_flags

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VqaOptions:
    """How questions are put and answers are drawn; LLaVA's flags of the same names.

    Attributes:
        image_folder: where the questions' image names start from: a folder or URL.
        image_access: where they may lead; see `llava.data.images.IMAGE_ACCESS`.
        conv_mode: name of the prompt template.
        temperature: 0 takes the likeliest token each time; above 0 it samples.
        top_p: sample from the likeliest tokens of this total probability; None: from all.
        num_beams: width of the beam search; 1: none.
        max_new_tokens: longest answer in tokens.
        batch_size: questions that are answered at once.
        no_images: leave the images out: what the language model guesses from the question alone.
        count_visual_tokens: write the images' visual tokens, before and after reduction, into `metadata`.
            This runs the vision tower a second time.
    """

    image_folder: str = ""
    image_access: str = IMAGE_ACCESS[0]
    conv_mode: str = "vicuna_v1"
    temperature: float = 0.2
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    batch_size: int = 8
    no_images: bool = False
    count_visual_tokens: bool = False

    def __post_init__(self) -> None:
        get_template(self.conv_mode)
        if self.image_access not in IMAGE_ACCESS:
            raise ValueError(f"image_access={self.image_access!r}: choose {', '.join(IMAGE_ACCESS)}")
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or above")

    def locations(self, question: Question) -> list[str]:
        """Paths or URLs of a question's images, without `no_images`.

        Raises:
            ValueError: one leads where `image_access` does not allow; the question is named.
        """
        names = () if self.no_images else question.images
        return [_of_question(question, locate_image, self.image_folder, name, self.image_access) for name in names]


def _of_question(question: Question, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function for a question, which its ValueErrors then name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"question {question.question_id!r:.100}: {error}") from error


def check_images(questions: Sequence[Question], options: VqaOptions) -> None:
    """Look for all images, so that a missing one is found before the model is opened.

    Raises:
        ValueError: the first one that is not there, with its question.
    """
    for question in questions:
        for location in options.locations(question):
            _of_question(question, check_image_exists, location)


class Answerer:
    """A model with what it takes to answer a batch of questions.

    Args:
        tokenizer, model, image_processor: of `load_pretrained_model`.
        options: see `VqaOptions`.
    """

    def __init__(self, tokenizer: Any, model: Any, image_processor: Any, options: VqaOptions) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.options = options
        stop = get_template(options.conv_mode).stop
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        self._stop = stop
        self._eos = sorted({tokenizer.eos_token_id, stop_id} - {None, tokenizer.unk_token_id})
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def answer(self, questions: Sequence[Question]) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """For each question its answer, and its images' visual tokens (before, after) if they are counted."""
        groups = [self._pictures(question) for question in questions]
        counts = [len(group) for group in groups]
        ids, mask = self._prompts(questions, counts)
        pictures = [picture for group in groups for picture in group]
        images = list(process_images(pictures, self.image_processor, self.model.config)) if pictures else []
        sizes = [picture.size for picture in pictures]
        new = self.model.generate(
            ids,
            attention_mask=mask,
            images=images,
            image_sizes=sizes,
            texts=[question.text for question in questions],
            **self._generation(),
        )
        answers = [text.split(self._stop)[0].strip() for text in self._decode(new)]
        texts = [question.text for question, count in zip(questions, counts, strict=True) for _ in range(count)]
        return list(zip(answers, self._count(images, sizes, texts, counts), strict=True))

    def _pictures(self, question: Question) -> list[Image.Image]:
        """A question's images, those of files first; none with `no_images`."""
        files = [_of_question(question, open_image, place) for place in self.options.locations(question)]
        own = () if self.options.no_images else question.pictures
        return files + [_of_question(question, load_image, io.BytesIO(content), "in its row") for content in own]

    def _prompts(self, questions: Sequence[Question], image_counts: list[int]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask, [B, S]."""
        marked = bool(getattr(self.model.config, "mm_use_im_start_end", False))
        rows = [
            build_prompt_ids(q.text, self.tokenizer, self.options.conv_mode, count, mm_use_im_start_end=marked)
            for q, count in zip(questions, image_counts, strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        return ids.to(self.model.device), mask.to(self.model.device)

    def _generation(self) -> dict[str, Any]:
        options = self.options
        sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
        return {
            "do_sample": options.temperature > 0,
            "num_beams": options.num_beams,
            "max_new_tokens": options.max_new_tokens,
            "eos_token_id": self._eos,
            "pad_token_id": self._pad,
            **sampling,
        }

    def _decode(self, new: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _count(
        self, images: list[Tensor], sizes: list[tuple[int, int]], texts: list[str], image_counts: list[int]
    ) -> list[list[tuple[int, int]] | None]:
        """The visual tokens of each question's images, or None for each."""
        if not self.options.count_visual_tokens:
            return [None] * len(image_counts)
        counted = iter(self.model.count_visual_tokens(images, sizes, texts) if images else [])
        return [[next(counted) for _ in range(count)] for count in image_counts]


def answer_questions(
    answerer: Answerer, questions: Sequence[Question], answers_file: str | Path, model_id: str, run: str = ""
) -> None:
    """Write the answers to questions as LLaVA's answers.jsonl: in order, and all or nothing.

    Answers gather in a file beside it, named after `run`; a later call with the same `run` goes on there.

    Args:
        answerer: the model.
        questions: what to ask.
        answers_file: where the answers go, in place of earlier answers.
        model_id: the model's name in the answers.
        run: says which run this is; runs of other models or options must differ in it.

    Raises:
        ValueError: the file exists and holds something other than answers, or nothing can be written there.
    """
    check_answers(answers_file, overwrite=True)
    target = Path(answers_file).resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{hashlib.sha256(run.encode()).hexdigest()[:12]}.partial")
    done = _resume(partial, questions)
    size = answerer.options.batch_size
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), desc=target.stem, disable=None) as progress,
    ):
        progress.update(done)
        for start in range(done, len(questions), size):
            batch = questions[start : start + size]
            for row in _rows(answerer, batch, model_id):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
    partial.replace(target)


def check_answers(answers_file: str | Path, overwrite: bool) -> None:
    """Raise a ValueError where answers may not be written.

    Args:
        answers_file: where they go.
        overwrite: in place of earlier answers; anything else is never replaced.
    """
    target = Path(answers_file)
    check_writable(target.resolve().parent, f"the folder of answers file {target}:")
    if target.is_dir() or (target.exists() and not _holds_answers(target)):
        raise ValueError(f"answers file {target} exists and holds no answers: it is not replaced; choose another name")
    if target.exists() and not overwrite:
        raise ValueError(
            f"answers file {target} exists; choose another name, or pass overwrite=True (--overwrite) to replace it"
        )


def _holds_answers(file: Path) -> bool:
    try:
        return all({"question_id", "answer_id", "text"} <= row.keys() for _, row in read_jsonl(file))
    except (ValueError, OSError):
        return False


def _rows(answerer: Answerer, batch: Sequence[Question], model_id: str) -> Iterator[dict[str, Any]]:
    for question, (text, tokens) in zip(batch, answerer.answer(batch), strict=True):
        yield {
            "question_id": question.question_id,
            "prompt": question.text,
            "text": text,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "metadata": {} if tokens is None else {"visual_tokens": tokens},
            **question.row,
        }


def _resume(partial: Path, questions: Sequence[Question]) -> int:
    """How many questions an interrupted run has answered; whatever does not fit is cut off the file."""
    if not partial.is_file():
        return 0
    whole = partial.read_bytes().rpartition(b"\n")
    partial.write_bytes(whole[0] + whole[1])  # a last line without its end was being written
    done = [row.get("question_id") for _, row in read_jsonl(partial)]
    if done != [question.question_id for question in questions[: len(done)]]:
        partial.unlink()
        return 0
    logger.info("going on after %d answers of an interrupted run in %s", len(done), partial)
    return len(done)


def evaluate(
    model_path: str | Path,
    question_file: str | Path,
    answers_file: str | Path,
    *,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    reduction: Any = None,
    num_chunks: int = 1,
    chunk_idx: int = 0,
    options: VqaOptions | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    read: Callable[[str | Path], Sequence[Question]] = read_questions,
) -> None:
    """Open a checkpoint and answer a file of questions, or one chunk of it.

    Args:
        model_path, model_base, vision_tower, reduction, device, dtype: see `load_pretrained_model`.
        question_file: see `read`.
        answers_file: where the answers go, see `answer_questions`.
        num_chunks, chunk_idx: answer one of so many parts.
        options: see `VqaOptions`.
        overwrite: replace earlier answers.
        read: reads the questions of a file.

    Raises:
        ValueError: the checkpoint, a question or an image cannot be read, or the answers can't be written; it is named.
    """
    target = Path(answers_file)
    check_apart(target, "answers file", {"question file": question_file})
    check_answers(target, overwrite)
    options = options or VqaOptions()
    questions = get_chunk(read(question_file), num_chunks, chunk_idx)
    check_images(questions, options)
    with lock(target.with_name(f".{target.name}.lock"), f"answers file {target}"):
        tokenizer, model, image_processor, _ = load_pretrained_model(
            model_path,
            model_base,
            None,
            vision_tower=vision_tower,
            reduction=reduction,
            device=device,
            dtype=dtype,
        )
        changed = max((file.stat().st_mtime for file in Path(model_path).glob("*") if file.is_file()), default=0.0)
        run = [str(model_path), changed, str(model_base), str(vision_tower), repr(reduction), asdict(options)]
        name = get_model_name_from_path(os.fspath(model_path))
        answerer = Answerer(tokenizer, model, image_processor, options)
        answer_questions(answerer, questions, target, name, json.dumps(run, sort_keys=True))


def build_parser(**defaults: Any) -> argparse.ArgumentParser:
    """The flags of LLaVA's programs that answer questions; `defaults` are those in which a program differs."""
    parser = argparse.ArgumentParser(description="Answer questions about images with a checkpoint.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base", default=None, help="language model under a LoRA or projector-only folder")
    parser.add_argument("--vision-tower", default=None, help="folder in place of the config's mm_vision_tower")
    parser.add_argument("--reduction", default=None, help="method in place of the checkpoint's; none: all tokens")
    parser.add_argument("--layer_list", default=None, help="as PyramidDrop's release has it, e.g. [8,16,24]")
    parser.add_argument("--image_token_ratio_list", default=None, help="with --layer_list, e.g. [0.5,0.25,0.125]")
    parser.add_argument("--pdrop_infer", action="store_true", help="for PyramidDrop's scripts; the lists say it")
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--image-access", "--image_access", default=VqaOptions.image_access, choices=IMAGE_ACCESS)
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--answers-file", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace an answers file that exists")
    parser.add_argument("--conv-mode", default="llava_v1")
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=VqaOptions.temperature)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=VqaOptions.num_beams)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=VqaOptions.batch_size)
    parser.add_argument("--no-images", action="store_true", help="leave the images out")
    parser.add_argument("--count-visual-tokens", action="store_true", help="write token counts into metadata")
    parser.set_defaults(**defaults)
    return parser


def eval_model(args: argparse.Namespace, read: Callable[[str | Path], Sequence[Question]] = read_questions) -> None:
    """Do what the flags of `build_parser` say; see `evaluate`."""
    flags = {name: value for name, value in vars(args).items() if name != "pdrop_infer"}
    options = VqaOptions(**{name: flags.pop(name) for name in VqaOptions.__dataclass_fields__})
    released = (flags.pop(name) for name in ("layer_list", "image_token_ratio_list"))
    flags["reduction"] = join_pyramiddrop_flags(flags["reduction"], *released)
    evaluate(options=options, read=read, **flags)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
