"""transformers' Trainer with LLaVA's learning rates, sampling and checkpoint files."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import deepspeed_load_checkpoint
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, seed_worker

from llava.data.stored_features import StoredFeatures
from llava.data.streaming import StreamingSupervisedDataset
from llava.files import CHECKPOINT_FILES, adopt_checkpoint, atomic_folder, note_files, write_file_list
from llava.model.language_model.batch_counts import Totals
from llava.model.weights import NonFiniteWeightsError, raise_for_nonfinite
from llava.reduction.base import EncoderReducer, ProjectorReducer, TowerReducer
from llava.train.checkpoints.folders import (
    STATE_FILE,
    CannotWriteError,
    make_room,
    remove_old_checkpoints,
    write_errors_named,
)
from llava.train.checkpoints.resume import RATES, SETTINGS_FILE
from llava.train.checkpoints.saving import RunKind, load_run, part_of, save_run
from llava.train.launching.stop import RunStoppedError, StopOnSignal, ignore_signals
from llava.train.logs.batch_meter import BatchMeter, VisualTokenMeter
from llava.train.logs.divergence import DivergedError, diverged, samples_of_steps, what_is_left, write_samples
from llava.train.logs.metrics_file import MetricsFile, strict_json
from llava.train.logs.progress import TrainingBar
from llava.train.logs.run_meter import RunMeter
from llava.train.sampler import EpochSampler, ModalityLengthSampler, TokenBatchSampler
from llava.train.settings.arguments import TrainingArguments, split_names
from llava.transfer import to_device

logger = logging.getLogger(__name__)

STAGING = ".incomplete"
STEPS_TO_LEARN = 10  # a run goes on so long without an answer to learn
GROUP_SETTINGS = ("lr", "weight_decay", "betas", "eps")  # of an optimizer's group of weights
PENDING_LOSS_FILE = "pending_loss.json"


def parameter_group_names(
    model: nn.Module, decayed: Collection[str], has_own_rate: Collection[str] = ()
) -> dict[tuple[str, bool], list[str]]:
    """Names of the trained weights, grouped by what the optimizer treats alike.

    Args:
        model: whose weights with requires_grad are grouped.
        decayed: names of weights that weight decay is applied to.
        has_own_rate: parts ("projector", "vision_tower") with a learning rate of their own.

    Returns:
        (part, decayed) -> names; the part is "base" where there is no own rate. "base" comes first, because the
        log shows the first group's rate. No group is empty.
    """
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            key = (part if part in has_own_rate else "base", name in decayed)
            groups.setdefault(key, []).append(name)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0] != "base", item[0][0], not item[0][1])))


class _EpochCallback(TrainerCallback):
    """Tells the sampler the epoch; accelerate does not when a resumed run skips batches on several ranks."""

    def __init__(self, sampler: EpochSampler | TokenBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _OnScheduleCallback(TrainerCallback):
    """Leaves out the checkpoint that transformers adds at the end: the result itself is written right after it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy == SaveStrategy.STEPS and state.global_step % state.save_steps != 0:
            control.should_save = False


class _FirstLineCallback(TrainerCallback):
    """Begins the first line of log when training begins: with the pending loss, which transformers has just reset."""

    def __init__(self, trainer: LLaVATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_line_of_log()


class _LossCallback(TrainerCallback):
    """Tells the meter where a step ends."""

    def __init__(self, meter: RunMeter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.losses.end_step()


def _init_worker(seed_worker: Callable[[int], None] | None, worker: int) -> None:
    ignore_signals(worker)
    if seed_worker is not None:
        seed_worker(worker)


class LLaVATrainer(Trainer):
    """Trains and saves a LLaVA model.

    Args:
        kind: what is trained, and so what a checkpoint holds.
        settings: of the run, as a checkpoint keeps them; see `llava.train.checkpoints.resume`.
        sample_lengths: tokens of each sample, which `--tokens_per_batch` needs; see `llava.train.lengths`.
        kwargs: those of transformers' Trainer.
    """

    if TYPE_CHECKING:  # inherited
        args: TrainingArguments
        model: Any

    def __init__(
        self,
        *,
        kind: RunKind,
        settings: dict[str, Any] | None = None,
        sample_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._sample_lengths = sample_lengths
        self._asked_groups: list[dict[str, Any]] = []
        self.add_callback(_OnScheduleCallback)
        self.add_callback(_FirstLineCallback(self))
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.kind = kind
        self._resumed_from: str | None = None
        self._is_staging = False
        reducers = [m for m in self.model.modules() if isinstance(m, TowerReducer | EncoderReducer | ProjectorReducer)]
        self._meters = [VisualTokenMeter(reducer) for reducer in reducers]
        self._meter = RunMeter(self.model, self.args)
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        self.add_callback(TrainingBar(False if self.args.disable_tqdm else None))
        self._batches_so_far: BatchMeter | None = BatchMeter()
        self.sampler: EpochSampler | TokenBatchSampler | None = None
        self.add_callback(MetricsFile)
        self.add_callback(_LossCallback(self._meter))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As transformers'; inside `stop.listening()` signals end it with a checkpoint, see `raise_if_stopped`."""
        self._resumed_from = resume_from_checkpoint
        output = super().train(resume_from_checkpoint, **kwargs)
        steps = self.state.global_step - self._initial_global_step
        if self.stop.stopped_by is None and (steps or not self.state.global_step):
            self._stop_if_nothing_is_learned(steps)
        return output

    def _stop_if_nothing_is_learned(self, steps: int) -> None:
        """Raise a ValueError where no step so far had an answer to learn; every rank must call it."""
        if self._batches_so_far is None:
            return
        own = self._batches_so_far.read(self.args.device)
        ranks = nested_gather(own.unsqueeze(0), self.args.parallel_mode)
        if Totals(*ranks.sum(dim=0).tolist()).answer_tokens:
            self._batches_so_far = None  # from now on nothing is waited for
            return
        raise ValueError(
            f"nothing was learned in {steps} steps, and no model is written: no answer begins within "
            f"--model_max_length {self.args.model_max_length}, all samples were skipped, or an epoch has no batch"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        # transformers would train one step more before it looks.
        logger.info("no step is left after step %d: the result is written", self.state.global_step)
        self.control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        """Raise a RunStoppedError where a signal ended the training before its last step."""
        if self.stop.stopped_by is not None:
            raise RunStoppedError(
                f"stopped by {self.stop.stopped_by} after step {self.state.global_step} of {self.state.max_steps}, "
                f"with a checkpoint in {self.args.output_dir}; start the same command again to go on"
            )

    def save_result(self) -> None:
        """Write what was trained to `output_dir`, and last the state, which says that it is whole.

        Every rank must call it. It ends on all of them when the result is whole: a rank that ended earlier, at a signal
        say, would make the launcher end the one that writes.
        """
        self.save_model()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            with write_errors_named(folder / STATE_FILE, folder), atomic_folder(folder) as staging:
                self.state.save_to_json(str(staging / STATE_FILE))
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers', with the visual tokens, the padding and the throughput since the last time."""
        for meter in self._meters:
            logs.update(meter.read())
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            del logs["train_loss"]  # no step was trained: it would be the mean of nothing
        if "loss" in logs:
            logs.update(self._meter.read())
            if not math.isfinite(logs["loss"]):
                self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves NaN for ever
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = strict_json(self.state.log_history[-1])
        if "loss" in logs:
            self._stop_if_diverged()
            steps = self.state.global_step - self._initial_global_step
            if steps >= STEPS_TO_LEARN:
                self._stop_if_nothing_is_learned(steps)

    def _stop_if_diverged(self) -> None:
        count, limit = self._meter.nonfinite_steps, self.args.stop_after_nonfinite_steps
        if limit and count >= limit:
            first = self.state.global_step - count + 1
            # The update of the step before may have spoilt the weights.
            steps = [step for step in (first - 1, first) if step]
            samples = samples_of_steps(self, steps)
            if self.args.should_save:
                write_samples(self.args.output_dir, samples)
            raise diverged(first, self.state.global_step, self.args.output_dir, samples)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As transformers'. In training the model's output says what the batch holds."""
        inputs = {**inputs, "return_dict": True, "draw": self._draw_of_step()}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if outputs.get("counts") is not None:
            for meter in filter(None, (self._meter.batches, self._batches_so_far)):
                meter.note(outputs["counts"])
        return (loss, outputs) if return_outputs else loss

    def _draw_of_step(self) -> int:
        """A number of this step and process: the same where a run that goes on comes to the step again."""
        return random.Random(f"{self.args.seed} {self.state.global_step} {self.args.process_index}").getrandbits(32)

    def _prepare_input(self, data: Any) -> Any:
        # Without waiting for the device, also for streams, which do not go through accelerate.
        if isinstance(data, torch.Tensor):
            data = to_device(data, self.args.device)
        elif isinstance(data, StoredFeatures):
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers'."""
        loss = super().training_step(*args, **kwargs)
        self._meter.losses.note(loss)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the flags ask for, with its own learning rate for projector and vision tower."""
        model = self.model if model is None else model
        wanted = {"projector": self.args.mm_projector_lr, "vision_tower": self.args.mm_vision_tower_lr}
        rates = {part: rate for part, rate in wanted.items() if rate is not None}
        if self.optimizer is None and rates:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            if kwargs.keys() & {"params", "model", "optimizer_dict"}:
                raise ValueError(f"--optim {self.args.optim} groups weights itself: leave out --mm_projector_lr")
            self.optimizer_cls_and_kwargs = (cls, {**kwargs, "params": self._parameter_groups(model, rates)})
        optimizer = super().create_optimizer(model)
        groups = getattr(optimizer, "param_groups", [])
        self._asked_groups = [{k: v for k, v in group.items() if k in GROUP_SETTINGS} for group in groups]
        return optimizer

    def _parameter_groups(self, model: nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
        names = parameter_group_names(model, set(self.get_decay_parameter_names(model)), set(rates))
        parameters = dict(model.named_parameters())
        return [
            {
                "params": [parameters[name] for name in group],
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "lr": rates.get(part, self.args.learning_rate),
            }
            for (part, decays), group in names.items()
        ]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self._data_seed
        sampler = EpochSampler(len(dataset), seed)
        if self.args.group_by_modality_length:
            sampler = ModalityLengthSampler(
                dataset.modality_lengths,
                batch_size=self.args.train_batch_size,
                batches_per_step=self.args.world_size * self.args.gradient_accumulation_steps,
                seed=seed,
            )
        self._follow_epochs(sampler)
        return sampler

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _follow_epochs(self, sampler: EpochSampler | TokenBatchSampler) -> None:
        self.sampler = sampler
        self.remove_callback(_EpochCallback)
        self.add_callback(_EpochCallback(sampler))

    def get_train_dataloader(self) -> DataLoader:
        """As transformers'; or of a stream or of batches by tokens, which are dealt to the processes already."""
        args = self.args
        if isinstance(self.train_dataset, StreamingSupervisedDataset):
            seeds, batches = None, {"batch_size": self._train_batch_size}
        elif args.tokens_per_batch:
            seeds = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
            batches = {"batch_sampler": self._token_batches(), "persistent_workers": args.dataloader_persistent_workers}
        else:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(_init_worker, seeds),
            **batches,
        )

    def _token_batches(self) -> TokenBatchSampler:
        args = self.args
        if self._sample_lengths is None:
            raise ValueError("tokens_per_batch needs the trainer's sample_lengths; see llava.train.lengths")
        sampler = TokenBatchSampler(
            self._sample_lengths,
            args.tokens_per_batch,
            self._data_seed,
            rank=args.process_index,
            ranks=args.world_size,
            accumulation=args.gradient_accumulation_steps,
            kinds=[n > 0 for n in self.train_dataset.modality_lengths] if args.group_by_modality_length else None,
            drop_last=args.dataloader_drop_last,
        )
        logger.info("tokens_per_batch: %s", sampler.describe())
        self._follow_epochs(sampler)
        return sampler

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        # Where all samples of a step were skipped nothing is learned: the loss is 0 / 1, not 0 / 0.
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        starts_workers = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper has the real one inside
        starts_workers.worker_init_fn = partial(_init_worker, starts_workers.worker_init_fn)
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what this kind of run trains; every rank must call it."""
        folder = output_dir or self.args.output_dir
        if self.is_fsdp_enabled:
            if self.args.should_save:
                Path(folder).mkdir(parents=True, exist_ok=True)
                # This program's, even if it is killed before their sizes stand there.
                note_files(Path(folder), dict.fromkeys(CHECKPOINT_FILES))
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                adopt_checkpoint(Path(folder))
            return
        # A checkpoint's errors are named where it is written, by the name that it will have.
        with nullcontext() if self._is_staging else write_errors_named(Path(folder), self.args.output_dir):
            try:
                save_run(self.model, self.kind, folder, writer=self.args.should_save, tokenizer=self.processing_class)
            except NonFiniteWeightsError as error:
                step, left = self.state.global_step, what_is_left(self.args.output_dir)
                raise DivergedError(f"the run has diverged: after step {step} {error}. {left}") from error
        if not self._is_staging:
            logger.info("wrote %s", folder)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir, STAGING)) if self._is_staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-STEP under another name and rename it when all ranks are done."""
        self._meter.watch.pause()
        self._write_checkpoint(model, trial)
        self._meter.watch.go_on()

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was stopped while it wrote
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            with write_errors_named(run_dir / name, run_dir):
                super()._save_checkpoint(model, trial)
                self._save_pending_loss(staging / name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if self._settings is not None:
                        (staging / name / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=1))
                    self._publish_checkpoint(staging / name, run_dir / name)
        except (CannotWriteError, DivergedError):
            shutil.rmtree(staging, ignore_errors=True)  # half a checkpoint would take the space of a whole one
            raise
        finally:
            self._is_staging = False
        self.accelerator.wait_for_everyone()

    def _publish_checkpoint(self, staged: Path, target: Path) -> None:
        """Give a checkpoint that all ranks have written its name, and remove what is too old."""
        write_file_list(staged)
        make_room(target)
        staged.replace(target)
        staged.parent.rmdir()
        logger.info("wrote %s", target)
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(target.parent, self.state.global_step, self.args.save_total_limit, keep=best)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers'."""
        self._meter.watch.pause()
        metrics = super().evaluate(*args, **kwargs)
        self._meter.watch.go_on()
        return metrics

    def _save_pending_loss(self, folder: Path) -> None:
        """Keep the sum of the losses since the last line of log, which the next line is the mean of."""
        pending = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        if self.args.should_save:
            values = {"loss": str(pending), "last_logged": self._globalstep_last_logged}  # NaN is no JSON
            (folder / PENDING_LOSS_FILE).write_text(json.dumps(values), encoding="utf-8")

    def begin_line_of_log(self) -> None:
        """Start the watch, and go on with the sum of losses that the checkpoint kept."""
        self._meter.watch.lap()
        file = Path(self._resumed_from or "", PENDING_LOSS_FILE)
        if self._resumed_from and file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            self._tr_loss.fill_(float(values["loss"]))
            self._globalstep_last_logged = values["last_logged"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.is_deepspeed_enabled and self.kind is RunKind.PROJECTOR):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # DeepSpeed would write the frozen language model along with the projector.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', except that rates that `--resume_changed` names are this run's, not the checkpoint's."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not set(split_names(self.args.resume_changed or "")) & set(RATES):
            return
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        schedule.base_lrs = [group["lr"] for group in self._asked_groups]
        for group, asked, part in zip(
            self.optimizer.param_groups, self._asked_groups, schedule.lr_lambdas, strict=True
        ):
            group.update(asked, initial_lr=asked["lr"], lr=asked["lr"] * part(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_run(self.model if model is None else model, self.kind, resume_from_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = self._prepare_as_usual(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint:
            raise_for_nonfinite(resume_from_checkpoint, self.model.named_parameters())
        return prepared

    def _prepare_as_usual(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not (resume_from_checkpoint and self.is_deepspeed_enabled and self.kind is RunKind.PROJECTOR):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strict: the frozen weights are not in the checkpoint, they are those that the run began with.
        deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared
