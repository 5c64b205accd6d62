"""The data of a run: read, dealt to the processes, and at the end what was skipped of it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from llava import conversation
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.items import ItemMaker
from llava.data.rejects import REJECTS_FILE, Rejects, forget_rejects, join_rejects
from llava.data.streaming import StreamingSupervisedDataset
from llava.model.multimodal_encoder.processor import load_image_processor
from llava.model.multimodal_encoder.vision_tower import resolve_vision_config
from llava.reduction.config import ReductionConfig
from llava.train.checkpoints.folders import read_state
from llava.train.settings.parsing import Arguments
from llava.video import Sampling

logger = logging.getLogger(__name__)

TrainingData = LazySupervisedDataset | StreamingSupervisedDataset


def prepare_data(arguments: Arguments, config: Any, tokenizer: Any, checkpoint: str | None) -> TrainingData:
    """The data of a run, as far as a checkpoint has come with it; the first process of a machine converts it."""
    training = arguments.training
    if checkpoint is None and training.should_save:
        forget_rejects(training.output_dir)
    with training.main_process_first(desc="reading the data"):
        dataset = load_dataset(
            arguments,
            config,
            tokenizer,
            rejects=Rejects(training.output_dir, training.process_index),
            rank=training.process_index,
            world_size=training.world_size,
        )
    if isinstance(dataset, StreamingSupervisedDataset):
        training.ignore_data_skip = True  # the stream itself goes on from where it was
        steps = read_state(checkpoint)["global_step"] if checkpoint else 0
        dataset.resume(steps * training.gradient_accumulation_steps, training.train_batch_size)
    return dataset


def load_dataset(
    arguments: Arguments,
    config: Any,
    tokenizer: Any,
    *,
    rejects: Rejects | None = None,
    rank: int = 0,
    world_size: int = 1,
    judge: bool = True,
) -> TrainingData:
    """The conversations to learn from, all checked unless they are streamed.

    Args:
        arguments: of the run, with settings filled in by `read_config`.
        config: from `read_config`.
        tokenizer: of the language model.
        rejects: where skipped samples are written.
        rank: of this process, among `world_size`; what a stream is dealt by.
        judge: False: bad samples raise nothing yet.
    """
    model_args, data_args, training = arguments.model, arguments.data, arguments.training
    asked = model_args.reduction
    reduction = ReductionConfig.of_model(config) if asked is None else ReductionConfig.parse(asked)
    tower = model_args.vision_tower or config.mm_vision_tower
    processor = load_image_processor(tower, training.cache_dir, side=resolve_vision_config(tower).image_size)
    seed = training.seed if training.data_seed is None else training.data_seed
    options: dict[str, Any] = {
        "version": model_args.version,
        "image_folder": data_args.image_folder,
        "image_access": data_args.image_access,
        "video_folder": data_args.video_folder,
        "mm_video_tower": model_args.video_tower,
        "sampling": Sampling(data_args.num_frames or Sampling.num_frames, data_args.video_fps, data_args.max_frames),
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "image_grid_pinpoints": data_args.image_grid_pinpoints,
        "mm_use_im_start_end": bool(model_args.mm_use_im_start_end),
        "text": reduction.encoder.get("text", "question"),
        "on_bad_sample": data_args.on_bad_sample,
        "rejects": rejects,
    }
    path = data_args.data_path or ""
    if not data_args.streaming:
        return LazySupervisedDataset(path, tokenizer, processor, seed=seed, judge=judge, **options)
    return StreamingSupervisedDataset(
        path,
        ItemMaker(tokenizer, processor, **options),
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_buffer=data_args.shuffle_buffer_size,
    )


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """A trainer's data as LLaVA's programs make it, for `LLaVATrainer(model=model, ..., **the result)`.

    Args:
        tokenizer: of the language model, with a padding token.
        data_args: a `DataArguments`, to which LLaVA's programs add `image_processor` and `mm_use_im_start_end`. The
            template is `version` there, otherwise `llava.conversation.default_conversation`, which they set.

    Returns:
        `train_dataset`, `eval_dataset` (None) and `data_collator`.
    """
    dataset = LazySupervisedDataset(
        data_args.data_path,
        tokenizer,
        getattr(data_args, "image_processor", None),
        version=getattr(data_args, "version", None) or conversation.default_conversation.version,
        image_folder=data_args.image_folder,
        image_aspect_ratio=data_args.image_aspect_ratio,
        image_grid_pinpoints=getattr(data_args, "image_grid_pinpoints", None),
        mm_use_im_start_end=bool(getattr(data_args, "mm_use_im_start_end", False)),
        video_folder=getattr(data_args, "video_folder", None),
    )
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


def report_rejects(trainer: Any) -> None:
    """Join what all processes skipped, and say how many samples that were; every process must call it."""
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    entries = join_rejects(trainer.args.output_dir)
    if entries:
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(e["kind"] for e in entries).most_common())
        logger.warning(
            "skipped %d bad samples (%s); %s says which and why",
            len(entries),
            kinds,
            Path(trainer.args.output_dir, REJECTS_FILE),
        )
