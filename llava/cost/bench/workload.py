"""What is run to be timed: a question on pictures, answered, or a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.cost.bench.timing import Clock, Phases
from llava.model.language_model.staged import StagedCache
from llava.model.splice import Spliced
from llava.reduction.base import Reducers

TEXT_BEFORE = 35  # tokens of a system prompt, in front of the picture
PHASES = ("tower", "reduction", "projector", "splice", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one request holds.

    Attributes:
        batch: requests at once.
        images: pictures a request.
        tiles: of each picture, with the whole one; 1 without anyres.
        text_tokens: of a request, system prompt and question.
        new_tokens: of an answer.
    """

    batch: int = 1
    images: int = 1
    tiles: int = 1
    text_tokens: int = 60
    new_tokens: int = 16

    @property
    def learnt_tokens(self) -> int:
        """Of a sample in training: the last half of its text."""
        return self.text_tokens // 2

    def __post_init__(self) -> None:
        for name in ("batch", "images", "tiles", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.text_tokens < TEXT_BEFORE + 1:
            raise ValueError(f"text_tokens={self.text_tokens}: must be more than the system prompt's {TEXT_BEFORE}")


@dataclass
class Inputs:
    """Tensors of a workload, on the model's device."""

    input_ids: Tensor
    images: list[Tensor]
    image_sizes: list[tuple[int, int]]
    texts: list[str]


def make_inputs(model: Any, work: Workload, seed: int = 0) -> Inputs:
    """Pictures of noise and words at random; what they are does not change what a fixed budget costs."""
    generator = torch.Generator().manual_seed(seed)
    side = model.get_vision_tower().image_size
    shape = (3, side, side) if work.tiles == 1 else (work.tiles, 3, side, side)
    pictures = [torch.randn(shape, generator=generator) for _ in range(work.batch * work.images)]
    ids = torch.randint(5, model.config.vocab_size, (work.batch, work.text_tokens), generator=generator)
    markers = torch.full((work.batch, work.images), IMAGE_TOKEN_INDEX)
    ids = torch.cat([ids[:, :TEXT_BEFORE], markers, ids[:, TEXT_BEFORE:]], dim=1)
    return Inputs(
        ids.to(model.device),
        [picture.to(model.device, model.dtype) for picture in pictures],
        [(2 * side, 2 * side)] * len(pictures),
        ["What is in the picture?"] * work.batch,
    )


def splice_inputs(model: Any, inputs: Inputs, reducers: Reducers) -> Spliced:
    """Encode the pictures and put them into the text."""
    spliced: Spliced = model.splice_images(
        inputs.input_ids,
        None,
        None,
        inputs.images,
        inputs.image_sizes,
        inputs.texts,
        left=True,
        reduction=reducers,
    )
    return spliced


def count_image_tokens(model: Any, inputs: Inputs, reducers: Reducers) -> float:
    """Visual tokens of a request, on average over the batch."""
    with torch.no_grad():
        index = splice_inputs(model, inputs, reducers).image_index
    return float((index >= 0).sum()) / len(index)


def stand_in_tokenizer(vocabulary: int) -> Callable[..., BatchEncoding]:
    """For CLIP's text tower of a model with random weights: some ids, the last the highest, as CLIP's ends."""

    def tokenize(texts: str | list[str], **_: Any) -> BatchEncoding:
        some = torch.arange(vocabulary - 8, vocabulary)
        if isinstance(texts, str):  # as lists, for a method that cuts the text itself
            return BatchEncoding({"input_ids": some.tolist()})
        ids = some.expand(len(texts), -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    return tokenize


class StandInWords:
    """In place of the language model's tokenizer, for a method that reads words: a word is one id."""

    bos_token_id = 1

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, word: str, **_: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": [sum(word.encode()) % self._vocabulary]})


class Answering:
    """Answers a workload with one method, phase by phase.

    Args:
        model: LLaVA model in eval mode.
        reducers: the method.
        work: what to answer.
    """

    def __init__(self, model: Any, reducers: Reducers, work: Workload) -> None:
        self.model, self.reducers, self.work = model, reducers, work
        self.inputs = make_inputs(model, work)
        self.image_tokens = count_image_tokens(model, self.inputs, reducers)
        self.clock = Clock(model.device)
        self.phases = Phases(self.clock)

    def __call__(self) -> dict[str, float]:
        """Seconds of each phase, of the whole up to the `first_token`, of one decoded token; bytes of the cache."""
        clock, inner = self.clock, self.model.get_model()
        watched = {
            "tower": inner.get_vision_tower(),
            "reduction": self.reducers.encoder,
            "projector": self.reducers.projector or inner.mm_projector,
        }
        self._forget_peak()
        clock.wait()
        start = clock.mark()
        with torch.inference_mode(), self.phases.watch(watched):
            with self.phases.phase("encode"):
                prompt = self._prompt()
            cache = self._new_cache()
            with self.phases.phase("prefill"):
                logits = self._forward(cache, **prompt)
            first = clock.mark()
            with self.phases.phase("decode"):
                self._decode(logits, prompt["attention_mask"], cache)
        seconds = self.phases.seconds()
        whole = seconds.pop("encode")
        seconds["splice"] = whole - sum(seconds.get(name, 0.0) for name in ("tower", "reduction", "projector"))
        seconds["decode"] /= max(1, self.work.new_tokens - 1)
        seconds["first_token"] = clock.seconds(start, first)
        request = seconds["first_token"] + seconds["decode"] * (self.work.new_tokens - 1)
        return {
            **seconds,
            "requests_per_second": self.work.batch / request,
            "cache_bytes": float(cache_bytes(cache)),
            "image_tokens": self.image_tokens,
            **self._peak(),
        }

    @torch.inference_mode()
    def first_token(self) -> None:
        """Everything up to the first token, without measurements."""
        self._forward(self._new_cache(), **self._prompt())

    def _new_cache(self) -> Any:
        return DynamicCache() if self.reducers.decoder is None else StagedCache(config=self.model.config)

    def _prompt(self) -> dict[str, Any]:
        spliced = splice_inputs(self.model, self.inputs, self.reducers)
        return {
            "inputs_embeds": spliced.inputs_embeds,
            "attention_mask": spliced.attention_mask,
            "image_index": spliced.image_index,
            "plan": spliced.plan,
        }

    def _forward(self, cache: Any, **inputs: Any) -> Tensor:
        if self.reducers.decoder is None:
            inputs.pop("image_index", None)
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, reduction=self.reducers)
        return output.logits[:, -1:]

    def _decode(self, logits: Tensor, mask: Tensor, cache: Any) -> None:
        for _ in range(self.work.new_tokens - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._forward(cache, input_ids=logits.argmax(dim=-1), attention_mask=mask)

    def _forget_peak(self) -> None:
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)

    def _peak(self) -> dict[str, float]:
        if self.clock.device.type != "cuda":
            return {}
        return {"peak_bytes": float(torch.cuda.max_memory_allocated(self.clock.device))}


class Training:
    """A step of training with one method: forward, backward and the optimizer.

    Args:
        model: LLaVA model in training mode, with the weights that learn.
        reducers: the method.
        work: its batch; the last half of the text is learnt.
        optimizer: of the weights that learn.
    """

    def __init__(self, model: Any, reducers: Reducers, work: Workload, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.reducers, self.work, self.optimizer = model, reducers, work, optimizer
        self.inputs = make_inputs(model, work)
        self.labels = self.inputs.input_ids.clone()
        self.image_tokens = count_image_tokens(model, self.inputs, reducers)
        self.labels[:, : -work.learnt_tokens] = IGNORE_INDEX
        self.clock = Clock(model.device)
        self.phases = Phases(self.clock)

    def step(self) -> None:
        """One step, without measurements."""
        self()

    def __call__(self) -> dict[str, float]:
        """Seconds of forward, backward, optimizer and the whole step; samples a second."""
        inputs = self.inputs
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)
        self.clock.wait()
        with self.phases.phase("step"):
            with self.phases.phase("forward"):
                loss = self.model(
                    input_ids=inputs.input_ids,
                    labels=self.labels,
                    images=inputs.images,
                    image_sizes=inputs.image_sizes,
                    texts=inputs.texts,
                    reduction=self.reducers,
                ).loss
            with self.phases.phase("backward"):
                loss.backward()
            with self.phases.phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        found = self.phases.seconds()
        found["image_tokens"] = self.image_tokens
        found["samples_per_second"] = self.work.batch / found["step"]
        if self.clock.device.type == "cuda":
            found["peak_bytes"] = float(torch.cuda.max_memory_allocated(self.clock.device))
        return found


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return sum(part.numel() * part.element_size() for pair in layers for part in pair if part is not None)
