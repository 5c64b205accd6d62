"""`llava doctor`: everything that can be checked of a run without training; and its quick part before every run."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from llava.data.dataset import LazySupervisedDataset
from llava.data.samples import VIDEO
from llava.reduction import ReductionConfig
from llava.train.checkpoints.output_dir import check_free, check_output_dir
from llava.train.checkpoints.resume import check_checkpoint, checkpoint_to_resume, run_settings
from llava.train.data import load_dataset
from llava.train.feature_key import check_cache_fits
from llava.train.modeling import load_tokenizer, read_config
from llava.train.preflight.features import check_feature_cache
from llava.train.preflight.findings import WARNING, Report
from llava.train.preflight.memory import GIB, check_disk, check_memory, device_memory, estimate_memory
from llava.train.preflight.models import check_model
from llava.train.preflight.samples import FEATURES, check_images_exist, check_learnable, check_reader, check_samples
from llava.train.settings.arguments import accumulation_steps, runs_on_cpu
from llava.train.settings.config import LaunchOptions, load_config
from llava.train.settings.parsing import Arguments, check_args
from llava.train.settings.problems import Problems

logger = logging.getLogger(__name__)


def examine(path: str | Path, overrides: list[str], device_gib: float | None = None) -> Report:
    """Check a run that a YAML file and `key=value` overrides describe: every sample, and the model without weights.

    Args:
        path: of the YAML file.
        overrides: `key=value`.
        device_gib: memory of a device, in place of those of this machine.

    Returns:
        All findings. A check that cannot go on leaves the others running.
    """
    report = Report()
    problems = Problems()
    with problems.catch():
        flags, options = load_config(path, overrides, problems)
        arguments = problems.check(check_args, flags)
        if arguments is not None:
            problems.check(_derive_accumulation, arguments.training, processes_of(options))
    for problem in problems.found:
        report.add("settings", problem)
    if not problems.found:
        _examine_run(arguments, options, device_gib, report)
    return report


def _derive_accumulation(training: Any, processes: int) -> None:
    if training.global_batch_size:
        training.gradient_accumulation_steps = accumulation_steps(
            training.global_batch_size, training.per_device_train_batch_size, processes
        )


def _examine_run(arguments: Arguments, options: LaunchOptions, device_gib: float | None, report: Report) -> None:
    config = tokenizer = None
    with report.catch("output"):
        check_output_dir(arguments)
        check_free(arguments)
    with report.catch("model"):
        config = read_config(arguments)
        tokenizer = load_tokenizer(arguments)
    if config is None or tokenizer is None:
        return
    model, count = check_model(arguments, config, report)
    data = _load_data(arguments, config, tokenizer, report)
    length = arguments.training.model_max_length
    if data is not None and model is not None and arguments.data.feature_cache:
        check_feature_cache(arguments, model, data, report)
    if data is not None:
        with report.catch(VIDEO):
            check_reader(data)
        length = check_samples(data, report, count.count if count else None, length)
    if arguments.training.fp16 and runs_on_cpu(arguments.training):
        report.add("fp16", "it needs a GPU, and this machine has none", WARNING)
    if model is not None:
        here = options.num_gpus or max(1, torch.cuda.device_count())
        device = int(device_gib * GIB) if device_gib is not None else _device_memory(arguments, here)
        world_size = processes_of(options)
        check_memory(report, estimate_memory(model, arguments, world_size, length), device)
        check_disk(report, model, arguments, 0 if data is None else len(data), world_size)
        _check_left_there(arguments, model, data, world_size, report)
        if data is not None:
            check_batches(arguments, len(data), world_size, report)


def check_batches(arguments: Arguments, samples: int, processes: int, report: Report) -> None:
    """Note that an epoch has no batch, where incomplete ones are dropped."""
    training = arguments.training
    batch = training.per_device_train_batch_size * processes
    if training.dataloader_drop_last and not training.tokens_per_batch and samples < batch:
        report.add(
            "data",
            f"--dataloader_drop_last True leaves no batch of {samples} samples: {processes} x "
            f"--per_device_train_batch_size {training.per_device_train_batch_size} are {batch}",
        )


def _check_left_there(arguments: Arguments, model: Any, data: Any, processes: int, report: Report) -> None:
    """Whether what lies in `output_dir` belongs to this run."""
    training = arguments.training
    with report.catch("checkpoint"):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        settings = run_settings(arguments, ReductionConfig.of_model(base.config), data, processes)
        check_checkpoint(checkpoint_to_resume(training), settings, training.resume_changed)


def _device_memory(arguments: Arguments, processes: int) -> int | None:
    """Bytes of the devices here, where the run uses them."""
    training = arguments.training
    on_cpu = training.use_cpu or (torch.cuda.is_available() and runs_on_cpu(training))
    return device_memory(on_cpu, processes)


def _load_data(arguments: Arguments, config: Any, tokenizer: Any, report: Report) -> LazySupervisedDataset | None:
    """The data with its bad samples in it, which are counted later; None where it cannot be read, or is streamed.

    Of a stream the beginning of each file is read.
    """
    if arguments.data.streaming:
        report.add("data", "it is streamed: samples are checked when their turn comes", WARNING)
    with report.catch("data"):
        dataset = load_dataset(arguments, config, tokenizer, judge=False)
        return dataset if isinstance(dataset, LazySupervisedDataset) else None
    return None


def processes_of(options: LaunchOptions) -> int:
    """Number of processes that a run will have: the slots of its hostfile, `num_gpus`, or the GPUs of this machine."""
    here = options.num_gpus or max(1, torch.cuda.device_count())
    if not options.hostfile:
        return here
    lines = Path(options.hostfile).read_text(encoding="utf-8").splitlines()
    slots = re.findall(r"^[^#\n]*\bslots=(\d+)", "\n".join(lines), re.MULTILINE)
    if not sum(map(int, slots)):
        raise ValueError(f"hostfile={options.hostfile}: expected a line `HOST slots=GPUS` for each machine")
    return sum(map(int, slots))


def summary(report: Report) -> str:
    """The last line of a report."""
    errors = len(report.errors)
    warnings = sum(finding.level == WARNING for finding in report.findings)
    if errors:
        return f"{errors} problem(s) to mend before training, {warnings} warning(s)"
    return f"ready to train, {warnings} warning(s)"


def preflight(arguments: Arguments, config: Any, dataset: Any) -> None:
    """Check quickly, on the first process, what would end a run later: images, shapes, methods and disk.

    Args:
        arguments: of the run; `preflight_seconds` limits the search for images, and 0 leaves all checks out.
        config: from `read_config`.
        dataset: of the run.

    Raises:
        ValueError: on every process, with a line for each problem.
    """
    training = arguments.training
    if training.preflight_seconds <= 0:
        return
    report = Report()
    if training.process_index == 0:
        model, count = check_model(arguments, config, report)
        is_table = isinstance(dataset, LazySupervisedDataset)
        if is_table and model is not None:
            with report.catch(FEATURES):
                check_cache_fits(dataset, model, arguments)
        if is_table:
            with report.catch(VIDEO):
                check_reader(dataset)
            check_images_exist(dataset, report, training.preflight_seconds)
            check_batches(arguments, len(dataset), training.world_size, report)
            if not report.errors:
                check_learnable(dataset, report, count.count if count else None, training.model_max_length)
        if model is not None and training.should_save:
            check_disk(report, model, arguments, len(dataset) if is_table else 0, training.world_size)
    problems = [[finding.line() for finding in report.errors]]
    if training.world_size > 1:
        broadcast_object_list(problems)
    for finding in report.ordered():
        if finding.level == WARNING:
            logger.warning("%s: %s", finding.kind, finding.message)
    if problems[0]:
        raise ValueError("the run would fail, so it is not started:\n" + "\n".join(problems[0]))
