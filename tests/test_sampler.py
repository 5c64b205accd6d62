"""Micro-batches that are filled with tokens: full, even over ranks, the same again, and the same loss."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.train.data import load_dataset
from llava.train.lengths import sample_lengths
from llava.train.logs.divergence import DivergedError
from llava.train.modeling import load_tokenizer, read_config
from llava.train.sampler import TokenBatchSampler
from llava.train.settings.parsing import parse_args
from llava.train.settings.problems import SettingsError
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.ranks import train_in_ranks, zero_flags
from tests.tiny_world import TinyWorld, make_tiny_world

BUDGET = 2048


def skewed(count: int, seed: int = 0) -> list[int]:
    """Lengths as of conversations with pictures: many short ones, a few that are cut."""
    draws = np.random.default_rng(seed).lognormal(5.5, 0.8, count)
    return np.clip(draws, 10, BUDGET).astype(int).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


# The sampler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 3), (8, 2)])
def test_micro_batches_are_full_and_ranks_have_equal_work(ranks: int, accumulation: int) -> None:
    lengths = skewed(3000)
    samplers = [
        TokenBatchSampler(lengths, BUDGET, 0, rank=rank, ranks=ranks, accumulation=accumulation)
        for rank in range(ranks)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(sampler) for sampler in samplers}) == 1
    assert [len(own) for own in batches] == [len(samplers[0])] * ranks
    assert sorted(chain.from_iterable(chain.from_iterable(batches))) == list(range(3000))
    tokens = np.array([[sum(lengths[i] for i in batch) for batch in own] for own in batches])
    whole = len(samplers[0].full) * accumulation
    assert tokens.max() <= BUDGET
    assert tokens[:, :whole].min() > 0.9 * BUDGET
    assert tokens[:, :whole].mean() > 0.98 * BUDGET
    slowest, mean = tokens[:, :whole].max(axis=0), tokens[:, :whole].mean(axis=0)
    assert (slowest / mean).mean() < 1.02


def test_steps_are_shuffled_by_seed_and_epoch() -> None:
    lengths = skewed(400)
    sampler, again, other = (TokenBatchSampler(lengths, BUDGET, seed, ranks=2) for seed in (0, 0, 1))
    first = list(sampler)
    assert first == list(again)
    assert first != list(other)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(list(sampler)[:-1]) == sorted(first[:-1])
    assert list(sampler)[-1] == first[-1]
    steps = sampler.steps_of_epoch(1)
    assert sampler.samples_of_step(1, 3, 99) == list(chain.from_iterable(steps[3]))


def test_steps_have_one_kind_of_samples() -> None:
    lengths = skewed(600)
    kinds = [index % 3 == 0 for index in range(600)]
    sampler = TokenBatchSampler(lengths, BUDGET, 0, ranks=2, kinds=kinds)
    mixed = [step for step in sampler.full if len({kinds[i] for i in chain.from_iterable(step)}) > 1]
    assert len(sampler.full) > 40
    assert len(mixed) <= 1  # of what filled no whole step of either kind


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_every_rank_has_a_batch_in_the_last_step(count: int) -> None:
    """Also with fewer samples than ranks: some are seen twice, as without tokens_per_batch."""
    samplers = [TokenBatchSampler([600] * count, 1000, 0, rank=rank, ranks=4, accumulation=2) for rank in range(4)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {-(-count // 4)}
    assert all(batch for own in batches for batch in own)
    seen = Counter(chain.from_iterable(chain.from_iterable(batches)))
    assert set(seen) == set(range(count))
    steps = samplers[0].steps_of_epoch(0)
    assert all(len(step) == 8 for step in steps[:-1])
    assert len(TokenBatchSampler([600] * count, 1000, 0, ranks=4, accumulation=2, drop_last=True)) == 2 * (count // 8)


def test_a_sample_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, more than tokens_per_batch 10"):
        TokenBatchSampler([5, 11], 10, 0)


# Lengths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"reduction": "none"}, True),
        ({"reduction": "{name: prumerge, ratio: 0.25}"}, True),
        ({"reduction": "{name: avgpool, kernel: 2}"}, True),
        ({"reduction": "prumerge"}, False),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[32, 64], [64, 32]]"}, False),
    ],
    ids=str,
)
def test_lengths_are_those_of_the_model(
    settings: dict[str, Any], exact: bool, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they can be known beforehand; otherwise they are no less."""
    seen: list[int] = []
    whole = LLaVATrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss, outputs = whole(self, model, inputs, **{**kwargs, "return_outputs": True})
        seen.append(int(outputs["counts"][0]))
        return loss

    monkeypatch.setattr(LLaVATrainer, "compute_loss", compute_loss)
    flags = world.flags(tmp_path, max_steps=6, tokens_per_batch=512, learning_rate=1e-4, **settings)
    trainer = train(parse_args(flags))
    assert trainer is not None
    expected = [sum(trainer._sample_lengths[i] for i in batch) for batch in list(trainer.sampler)]
    assert len(seen) == 6
    for got, most in zip(seen, expected * 6, strict=False):
        assert got == most if exact else got <= most


def test_an_adaptive_method_is_estimated(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"tokens_per_batch": 512, "reduction": "prumerge"}
    lengths = []
    for estimate in (0, 5):
        arguments = parse_args(world.flags(tmp_path, **settings, image_tokens_estimate=estimate))
        config = read_config(arguments)
        dataset = load_dataset(arguments, config, load_tokenizer(arguments))
        lengths.append(np.array(sample_lengths(arguments, config, dataset)))
    assert set(lengths[0] - lengths[1]) == {0, 16 - 5}  # a tile has 16 patches


# Runs ----------------------------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_the_loss_is_the_mean_over_all_answers_of_the_step(world: TinyWorld, tmp_path: Path) -> None:
    """Whatever the number of samples in a micro-batch: gradients of a step are those of all its samples at once."""
    settings = {"learning_rate": 1e-3, "max_steps": 1, "tokens_per_batch": 512}
    trainer = train(parse_args(world.flags(tmp_path / "run", gradient_accumulation_steps=2, **settings)))
    assert trainer is not None
    batches = trainer.sampler.steps_of_epoch(0)[0]
    assert len(batches) == 2
    model = train(parse_args(world.flags(tmp_path / "fresh", learning_rate=0, mm_projector_lr=1e-30, max_steps=1)))
    assert model is not None
    items = [trainer.train_dataset[i] for batch in batches for i in batch]
    batch = trainer.data_collator(items)
    with torch.no_grad():
        whole = model.model(**batch).loss
    assert losses(tmp_path / "run")[0] == pytest.approx(float(whole), abs=1e-4)


def test_an_interrupted_run_goes_on_at_its_sample(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"tokens_per_batch": 512, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for name, steps in (("straight", 5), ("resumed", 2), ("resumed", 5)):
        train(parse_args(world.flags(tmp_path / name, **settings, max_steps=steps)))
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)
    with pytest.raises(SettingsError, match="tokens_per_batch: 512 -> 600"):
        train(parse_args(world.flags(tmp_path / "straight", **{**settings, "tokens_per_batch": 600}, max_steps=9)))


def test_a_run_that_diverges_names_its_samples(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"tokens_per_batch": 512, "learning_rate": 1e30, "stop_after_nonfinite_steps": 1, "max_steps": 6}
    with pytest.raises(DivergedError, match="Step 2 had sample "):
        train(parse_args(world.flags(tmp_path, **settings)))


@pytest.mark.slow
def test_two_ranks_under_zero3(world: TinyWorld, tmp_path: Path) -> None:
    settings = {**zero_flags(3), "tokens_per_batch": 512, "gradient_accumulation_steps": 2, "max_steps": 3}
    train_in_ranks(world.flags(tmp_path / "run", **settings), 2, tmp_path / "log")
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": False}, "leave out --packing False"),
        ({"model_max_length": 1024}, "less than --model_max_length 1024"),
        ({"global_batch_size": 8}, "set --global_batch_size 0"),
        ({"streaming": True, "max_steps": 2}, "--streaming knows no lengths, so --tokens_per_batch"),
        ({"attn_implementation": "eager"}, "--attn_implementation eager"),
        ({"train_sampling_strategy": "sequential"}, "both choose the order"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(settings: dict[str, Any], message: str, world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_args(world.flags(tmp_path, tokens_per_batch=512, **settings))
