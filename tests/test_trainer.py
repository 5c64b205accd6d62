"""What the trainer overrides and uses of transformers' Trainer, whose insides may change with every minor version."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from transformers.trainer import deepspeed_load_checkpoint
from transformers.trainer_pt_utils import nested_gather

from llava.train import trainer as module
from llava.train.trainer import LLaVATrainer

METHODS = {
    "_get_dataloader": "self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key",
    "_get_num_items_in_batch": "self, batch_samples, device",
    "_get_output_dir": "self, trial",
    "_get_train_sampler": "self, train_dataset",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "self, checkpoint",
    "_load_scaler": "self, checkpoint",
    "_prepare_input": "self, data",
    "_prepare_for_training": "self, max_steps, train_dataloader, resume_from_checkpoint",
    "_run_epoch": "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save_checkpoint": "self, model, trial",
    "_save_optimizer_and_scheduler": "self, output_dir",
    "compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
    "create_optimizer": "self, model",
    "evaluate": "self, eval_dataset, ignore_keys, metric_key_prefix",
    "get_decay_parameter_names": "self, model",
    "get_optimizer_cls_and_kwargs": "args, model",
    "get_train_dataloader": "self",
    "log": "self, logs, start_time",
    "save_model": "self, output_dir, _internal_call",
    "train": "self, resume_from_checkpoint, trial, ignore_keys_for_eval",
    "training_step": "self, model, inputs, num_items_in_batch",
}
ATTRIBUTES = {  # and the method of transformers that sets it
    "_globalstep_last_logged": "_inner_training_loop",
    "_initial_global_step": "_inner_training_loop",
    "_tr_loss": "_inner_training_loop",
    "_train_batch_size": "__init__",
}


@pytest.mark.parametrize("name", METHODS)
def test_signature(name: str) -> None:
    assert ", ".join(inspect.signature(getattr(Trainer, name)).parameters) == METHODS[name]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name: str) -> None:
    assert name in getattr(Trainer, ATTRIBUTES[name]).__code__.co_names


def test_functions() -> None:
    assert str(inspect.signature(nested_gather)) == "(tensors, parallel_mode, name=None)"
    assert list(inspect.signature(deepspeed_load_checkpoint).parameters)[2] == "load_module_strict"


def test_nothing_that_is_used_is_left_out() -> None:
    """All that is overridden, and all names with an underscore that the class takes from transformers."""
    own = {name for name in vars(LLaVATrainer) if not name.startswith("__")}
    overridden = {name for name in own if hasattr(Trainer, name)}
    (tree,) = (
        node
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "LLaVATrainer"
    )
    used, assigned = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            (assigned if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    taken = (used - own - assigned) | (assigned & ATTRIBUTES.keys())
    assert overridden | taken <= METHODS.keys() | ATTRIBUTES.keys()
