"""Train LLaVA: read the flags, build tokenizer, data and model, train, write.

`main` is the whole run; `llava/train/train_mem.py` and `llava train` call it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.files import atomic_folder, note_files
from llava.model.language_model.packed import BY_BOUNDARIES, PACKED_SDPA, best_packed_attention
from llava.reduction import ReductionConfig
from llava.train.checkpoints.folders import STATE_FILE
from llava.train.checkpoints.output_dir import RUN_FILES, holding_output_dir
from llava.train.checkpoints.resume import (
    RUN_CONFIG_FILE,
    check_checkpoint,
    checkpoint_to_resume,
    is_finished,
    run_settings,
)
from llava.train.data import make_supervised_data_module, prepare_data, report_rejects
from llava.train.feature_key import check_cache_fits, use_feature_cache
from llava.train.launching.process import open_run_log, set_up_logging
from llava.train.lengths import sample_lengths
from llava.train.logs.run_info import write_run_info
from llava.train.logs.trackers import wandb_run
from llava.train.modeling import count_trainable, load_model, load_tokenizer, read_config, run_kind
from llava.train.preflight.doctor import preflight
from llava.train.settings.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    require_package,
    runs_on_cpu,
)
from llava.train.settings.parsing import Arguments, parse_args
from llava.train.trainer import LLaVATrainer

logger = logging.getLogger(__name__)

# What LLaVA's programs import from its module of this name.
__all__ = ["DataArguments", "ModelArguments", "TrainingArguments", "main", "make_supervised_data_module", "train"]


def main(argv: list[str]) -> None:
    """Run the training that the flags describe.

    Args:
        argv: LLaVA's and transformers' flags.

    Raises:
        ValueError: flags, data or checkpoints that do not fit; the culprit is named.
    """
    set_up_logging()
    train(parse_args(argv))


def train(arguments: Arguments | None = None, attn_implementation: str | None = None) -> LLaVATrainer | None:
    """Train and write the result to `output_dir`. A run that was interrupted goes on from its last checkpoint.

    Args:
        arguments: of the run; None: those of the command line, as LLaVA's `train_mem.py` wants it.
        attn_implementation: not read. That program passes flash_attention_2, which is taken wherever it can run; the
            flag of this name chooses another.

    Returns:
        The trainer, or None where `output_dir` has the result of these steps already.

    Raises:
        RunStoppedError: a signal ended it before its last step.
    """
    del attn_implementation
    if arguments is None:
        set_up_logging()
        arguments = parse_args(sys.argv[1:])
    with holding_output_dir(arguments):
        return _train(arguments)


def _train(arguments: Arguments) -> LLaVATrainer | None:
    training = arguments.training
    if is_finished(arguments):
        return None
    open_run_log(training.output_dir)
    report_idle_gpus(training)
    set_seed(training.seed)  # a new projector and new adapters are drawn from it
    training.attn_implementation = training.attn_implementation or best_attention(arguments)
    checkpoint = checkpoint_to_resume(training)
    config = read_config(arguments)
    choose_packing(training, config)
    tokenizer = load_tokenizer(arguments, checkpoint)
    dataset = prepare_data(arguments, config, tokenizer, checkpoint)
    use_feature_cache(dataset, arguments)
    preflight(arguments, config, dataset)
    lengths = None
    if training.tokens_per_batch and isinstance(dataset, LazySupervisedDataset):
        lengths = sample_lengths(arguments, config, dataset)
    model = load_model(arguments, config, tokenizer)
    check_cache_fits(dataset, model, arguments)
    log_trainable(model)
    reduction = ReductionConfig.of_model(model.config)
    settings = run_settings(arguments, reduction, dataset, training.world_size)
    check_checkpoint(checkpoint, settings, training.resume_changed)
    trainer = LLaVATrainer(
        kind=run_kind(arguments),
        settings=settings,
        sample_lengths=lengths,
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=DataCollatorForSupervisedDataset(tokenizer, packing=bool(training.packing)),
        processing_class=tokenizer,
    )
    write_run_config(arguments, checkpoint)
    with trainer.stop.listening(), wandb_run(training, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.raise_if_stopped()
        trainer.save_result()
        report_rejects(trainer)
    return trainer


def best_attention(arguments: Arguments) -> str:
    """flash_attention_2 where it is installed and can run (a GPU, 16-bit types), otherwise sdpa."""
    training = arguments.training
    if torch.cuda.is_available() and not training.use_cpu and (training.bf16 or training.fp16):
        try:
            require_package("flash_attn", "")
        except ValueError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def choose_packing(training: Any, config: Any) -> None:
    """Settle `packing` where it was left open, and with it the attention of the run.

    It is on where it is faster (docs/benchmarks.md): on the CPU, and on a GPU whose attention goes by the samples'
    boundaries. A batch of one sample has no padding to leave out.
    """
    attention = training.attn_implementation
    if attention == "sdpa":
        is_16_bit = training.bf16 or training.fp16
        attention = best_packed_attention(config, is_16_bit=is_16_bit and not training.use_cpu)
    if training.packing is None:
        is_fast = attention in BY_BOUNDARIES or (attention == PACKED_SDPA and runs_on_cpu(training))
        has_padding = training.per_device_train_batch_size > 1
        training.packing = bool(training.tokens_per_batch or (has_padding and is_fast))
        logger.info("packing: %s, as is faster here", training.packing)
    if training.packing:
        training.attn_implementation = attention


def report_idle_gpus(training: Any) -> None:
    """Say that one process trains on one GPU, where there are more, and how to use them all."""
    if training.idle_gpus:
        count = training.idle_gpus + 1
        logger.warning(
            "1 of %d GPUs trains (%s), since one process was started. For all of them start one process for each: "
            "llava train CONFIG num_gpus=%d, or deepspeed or torchrun --nproc_per_node %d llava/train/train_mem.py ...",
            count,
            training.device,
            count,
            count,
        )


def log_trainable(model: Any) -> None:
    """Say how many weights are trained.

    Raises:
        ValueError: none is.
    """
    counts = count_trainable(model)
    if not counts:
        raise ValueError("nothing is trained: the flags freeze the language model and the projector")
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    trained = sum(counts.values())
    logger.info("training %s of %s weights (%.2f %%): %s", f"{trained:,}", f"{total:,}", 100 * trained / total, parts)


def write_run_config(arguments: Arguments, checkpoint: str | None = None) -> None:
    """Write the run's settings to `output_dir`, in the form that `llava train` reads; and `run_info.json`.

    The file that marks an earlier result as whole is removed: that one was another run's, or of fewer steps.
    """
    if arguments.training.should_save:
        Path(arguments.training.output_dir, STATE_FILE).unlink(missing_ok=True)
        text = yaml.safe_dump(arguments.given, sort_keys=False)
        output_dir = Path(arguments.training.output_dir)
        with atomic_folder(output_dir) as folder:
            note_files(output_dir, dict.fromkeys(RUN_FILES))
            (folder / RUN_CONFIG_FILE).write_text(text, encoding="utf-8")
            write_run_info(arguments, checkpoint, folder)
