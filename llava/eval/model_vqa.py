"""Answer questions about images with a checkpoint, in batches: LLaVA's `model_vqa`.

python -m llava.eval.model_vqa --model-path CHECKPOINT --image-folder DIR --question-file Q --answers-file A
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.data.media.images import IMAGE_ACCESS
from llava.eval.answering import Answer, Answerer, VqaOptions, check_images
from llava.eval.questions import Question, get_chunk, read_jsonl, read_questions
from llava.files import check_apart, check_writable
from llava.lock import lock
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.reduction.config import join_pyramiddrop_flags

logger = logging.getLogger(__name__)


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
    batches = [questions[start : start + size] for start in range(done, len(questions), size)]
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), desc=target.stem, disable=None) as progress,
    ):
        progress.update(done)
        for batch, answers in zip(batches, answerer.answer_all(batches), strict=True):
            for question, answer in zip(batch, answers, strict=True):
                file.write(json.dumps(answer_row(question, answer, model_id), ensure_ascii=False) + "\n")
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


def answer_row(question: Question, answer: Answer, model_id: str) -> dict[str, Any]:
    """A row of LLaVA's answers.jsonl."""
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "metadata": {} if answer.visual_tokens is None else {"visual_tokens": answer.visual_tokens},
        **question.row,
        **({} if question.answer_key is None else {question.answer_key: answer.text}),
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
    parser.add_argument("--video-folder", default="", help="default: --image-folder")
    parser.add_argument("--num-frames", type=int, default=None, help="frames of a clip; default: the checkpoint's")
    parser.add_argument("--video-fps", type=float, default=None, help="frames a second, in place of so many")
    parser.add_argument("--max-frames", type=int, default=None, help="frames of a clip at most")
    parser.add_argument("--question-file", "--questions-file", required=True)
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
    parser.add_argument("--num-workers", type=int, default=None, help="processes that read images ahead")
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
