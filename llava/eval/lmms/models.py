"""The model that lmms-eval runs, for its simple and its chat form.

Shapes: B requests, S tokens a row of ids, K tokens from the first scored one on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger  # lmms-eval's log
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava.constants import IGNORE_INDEX
from llava.eval.answering import Answer, Answerer, Batch, VqaOptions
from llava.eval.lmms.prompts import Prompt, read_context, read_messages
from llava.eval.lmms.reduction import parse_reduction
from llava.mm_utils import process_images, process_video
from llava.model.builder import load_pretrained_model
from llava.reduction.config import ReductionConfig
from llava.video import Sampling

# Generation settings of tasks that mean something here.
GENERATION = ("until", "max_new_tokens", "temperature", "do_sample", "top_p", "num_beams")


@dataclass
class VisualTokenCounts(TokenCounts):
    """Tokens of a request, for lmms-eval's log of samples.

    Attributes:
        visual_tokens: of each image and clip, before and after the reduction.
    """

    visual_tokens: list[tuple[int, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What lmms-eval writes."""
        return {**super().to_dict(), "visual_tokens": self.visual_tokens}


class LlavaReduced(lmms):
    """Any checkpoint that `load_pretrained_model` opens, with any reduction: lmms-eval's simple form.

    Args:
        pretrained: folder or hub name.
        model_base, vision_tower, attn_implementation: see `load_pretrained_model`.
        device: default: this process's GPU, where there is one; several processes have one each.
        dtype: a name such as float16; default: the checkpoint's.
        batch_size: requests that are answered at once.
        conv_template: name of the prompt template.
        reduction: the method in place of the checkpoint's, see `parse_reduction`; none: all tokens.
        encoder, projector, decoder: methods by site, in place of `reduction`.
        num_frames, fps: which frames of a clip are taken: so many evenly, or a second; default: as the checkpoint was
            trained.
        max_frames_num: with `fps`, that many frames at most; otherwise what `num_frames` is, as in lmms-eval's models.
        options: options of the method that `reduction` names.

    Raises:
        ValueError: the checkpoint can't be opened, or an argument is not understood; it is named.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        vision_tower: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        conv_template: str = "vicuna_v1",
        attn_implementation: str | None = None,
        reduction: str | None = None,
        encoder: str | None = None,
        projector: str | None = None,
        decoder: str | None = None,
        num_frames: int | None = None,
        max_frames_num: int | None = None,
        fps: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_frames is None and fps is None:
            num_frames, max_frames_num = max_frames_num, None
        frames = (num_frames, fps, max_frames_num)
        Sampling.of_model(None, *frames)
        sites = {"encoder": encoder, "projector": projector, "decoder": decoder}
        method = parse_reduction(reduction, sites, options)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number from 1")
        self.batch_size, self.conv_template = int(batch_size), conv_template
        _vqa_options({}, conv_template)  # an unknown template is named before weights are read
        # A process that is done waits for the others, however long they take.
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = device if device is not None and self._world_size == 1 else self.accelerator.device
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            str(pretrained),
            model_base,
            device=place,
            torch_dtype=dtype,
            vision_tower=vision_tower,
            reduction=method,
            attn_implementation=attn_implementation,
        )
        self.device = self.model.device
        self.sampling = Sampling.of_model(self.model.config, *frames)
        self._ignored: set[str] = set()
        used = ReductionConfig.of_model(self.model.config).to_dict()
        logger.info("{} on {}, reduction: {}", pretrained, self.device, json.dumps(used) if used else "none")

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request, with its tokens; their mean over all images goes to lmms-eval's `throughput`."""
        results: list[Any] = [None] * len(requests)
        seconds = 0.0
        for places in self._batches(requests):
            generation = _generation(requests[places[0]])
            self._warn_of_ignored(generation)
            batch, _ = self._collate([requests[place] for place in places])
            started = time.perf_counter()
            answerer = Answerer(
                self.tokenizer, self.model, self.image_processor, _vqa_options(generation, self.conv_template)
            )
            answers = answerer.answer_batch(batch)
            seconds += time.perf_counter() - started
            for place, row, mask, answer in zip(places, batch.ids, batch.mask, answers, strict=True):
                results[place] = self._result(answer, generation, row[mask.bool()])
        _log(results, seconds)
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: LLaVA's checkpoints were not trained for the tasks that need it."""
        raise NotImplementedError("llava_reduced does not run tasks of output_type generate_until_multi_round")

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each request, as `text`: the mean loss of its continuation, and whether greedy decoding would give it.

        A loss, as in all models of lmms-eval 0.7, whose tasks with options choose the smallest. Of a bare pair its
        evaluator would make a string.
        """
        results: list[Any] = [None] * len(requests)
        for places in self._batches(requests):
            batch, labels = self._collate([requests[place] for place in places])
            for place, score in zip(places, self._score(batch, labels), strict=True):
                results[place] = GenerationResult(score)
        return results

    def _score(self, batch: Batch, labels: Tensor) -> list[tuple[float, bool]]:
        ids, mask, labels = (part.to(self.device) for part in (batch.ids, batch.mask, labels))
        spliced = self.model.splice_images(
            ids, mask, labels, batch.images, batch.sizes, batch.texts, left=True, videos=batch.videos
        )
        logits = self.model(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            position_ids=spliced.position_ids,
            image_index=spliced.image_index,
            labels=spliced.labels,  # by which a decoder reducer knows what the question is
            use_cache=False,
        ).logits
        # Rows end together, and no image follows the answer: whatever was dropped, the last K tokens are there.
        first = int((labels != IGNORE_INDEX).any(dim=0).int().argmax())
        targets = labels[:, first:]
        logits = logits[:, -targets.shape[1] - 1 : -1].float()
        scored = targets != IGNORE_INDEX
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
        )
        means = losses.sum(dim=1) / scored.sum(dim=1)
        greedy = ((logits.argmax(dim=2) == targets) | ~scored).all(dim=1)
        return list(zip(means.tolist(), greedy.tolist(), strict=True))

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests that go together: of one way to generate and of similar length, the longest first."""

        def settings(place: int) -> str:
            return json.dumps(_generation(requests[place]), sort_keys=True, default=str)

        places = sorted(range(len(requests)), key=lambda place: (settings(place), -len(requests[place].args[0])))
        with tqdm(total=len(places), desc="Model Responding", disable=self.rank != 0) as progress:
            for _, together in groupby(places, settings):
                group = list(together)
                for start in range(0, len(group), self.batch_size):
                    yield group[start : start + self.batch_size]
                    progress.update(len(group[start : start + self.batch_size]))

    def _read(self, request: Any) -> Prompt:
        """The prompt of a request."""
        context, second, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        answer = None
        if request.request_type == "loglikelihood":
            answer = str(second(doc) if callable(second) else second).strip()  # the template has its own space
        return read_context(context, doc_to_visual(doc), answer)

    def _collate(self, requests: Sequence[Any]) -> tuple[Batch, Tensor]:
        """A batch, and the labels [B, S] of the answers in it.

        Raises:
            ValueError: a request can't be read; its task and document are named.
        """
        config = self.model.config
        marked = bool(getattr(config, "mm_use_im_start_end", False))
        prompts, rows, pixels, clips = [], [], [], []
        for request in requests:
            try:
                prompt = self._read(request)
                rows.append(prompt.encode(self.tokenizer, self.conv_template, marked))
                pixels += list(process_images(prompt.images, self.image_processor, config)) if prompt.images else []
                clips += [self._frames(video) for video in prompt.videos]
            except ValueError as error:
                raise ValueError(f"task {request.task_name}, document {request.doc_id}: {error}") from error
            prompts.append(prompt)
        ids, labels = (
            pad_sequence(list(column), batch_first=True, padding_value=IGNORE_INDEX, padding_side="left")
            for column in zip(*rows, strict=True)
        )
        mask = ids != IGNORE_INDEX
        batch = Batch(
            ids=ids.masked_fill(~mask, 0),
            mask=mask.long(),
            images=pixels,
            sizes=[picture.size for prompt in prompts for picture in prompt.images],
            texts=[prompt.text for prompt in prompts],
            counts=[len(prompt.images) + len(prompt.videos) for prompt in prompts],
            videos=clips,
        )
        return batch, labels

    def _frames(self, video: Any) -> Tensor:
        """A clip's pixels, [F, 3, H, W]."""
        number, fps, most = self.sampling.num_frames, self.sampling.fps, self.sampling.max_frames
        return process_video(video, self.image_processor, self.model.config, number, fps=fps, max_frames=most)

    def _result(self, answer: Answer, generation: dict[str, Any], prompt: Tensor) -> GenerationResult:
        text, visual = answer.text, answer.visual_tokens or []
        until = generation.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0].strip() if stop else text
        counts = VisualTokenCounts(
            input_tokens=int((prompt >= 0).sum()) + sum(after for _, after in visual),
            output_tokens=len(self.tokenizer(answer.text, add_special_tokens=False).input_ids),
            visual_tokens=visual,
        )
        return GenerationResult(text, counts)

    def _warn_of_ignored(self, generation: dict[str, Any]) -> None:
        ignored = set(generation) - set(GENERATION) - self._ignored
        self._ignored |= ignored
        if ignored:
            logger.warning("generation settings of the task that have no effect: {}", ", ".join(sorted(ignored)))


class LlavaReducedChat(LlavaReduced):
    """The same model for lmms-eval's chat form: messages with images among the words, and earlier turns."""

    is_simple = False

    def _read(self, request: Any) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return read_messages(doc_to_messages(self.task_dict[task][split][doc_id]))


def _generation(request: Any) -> dict[str, Any]:
    """A request's way to generate: the one mapping among its arguments; empty where something is scored."""
    return next((argument for argument in request.args if isinstance(argument, dict)), {})


def _vqa_options(generation: dict[str, Any], conv_template: str) -> VqaOptions:
    """How to answer: greedily unless the task samples, in at most 1024 tokens, as lmms-eval's `llava` does."""
    samples = generation.get("do_sample")
    temperature = generation.get("temperature")
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    return VqaOptions(
        conv_mode=conv_template,
        temperature=0.0 if samples is False else float(temperature),
        top_p=generation.get("top_p"),
        num_beams=int(generation.get("num_beams") or 1),
        max_new_tokens=int(generation.get("max_new_tokens") or 1024),
        count_visual_tokens=True,
    )


def _log(results: Sequence[GenerationResult], seconds: float) -> None:
    """Tell lmms-eval how fast it went, and how many visual tokens an image had; it writes their means."""
    tokens = sum(result.token_counts.output_tokens for result in results)
    images = [pair for result in results for pair in result.token_counts.visual_tokens]
    more: dict[str, float] = {"total_requests": len(results)}
    if images:
        before, after = (sum(column) / len(images) for column in zip(*images, strict=True))
        more |= {"visual_tokens_per_image": after, "visual_tokens_per_image_without_reduction": before}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, additional_metrics=more)
