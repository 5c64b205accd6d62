"""Answer questions about images and clips with a model, in batches that a loader prepares while the device works."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from llava.conversation import get_template
from llava.data.media.images import IMAGE_ACCESS, check_image_exists, locate_image, open_image
from llava.data.media.videos import check_video_exists, locate_video, read_video
from llava.data.preprocessing import build_prompt_ids
from llava.eval.questions import Question
from llava.mm_utils import process_images
from llava.model.image_inputs import Clip, Picture, match_pictures, tile_counts
from llava.model.prompt_inputs import find_markers
from llava.pictures import load_image
from llava.transfer import HostBatch
from llava.video import Sampling

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VqaOptions:
    """How questions are put and answers are drawn; LLaVA's flags of the same names.

    Attributes:
        image_folder: where the questions' image names start from: a folder or URL.
        image_access: where they may lead; see `llava.data.media.images.IMAGE_ACCESS`.
        conv_mode: name of the prompt template.
        temperature: 0 takes the likeliest token each time; above 0 it samples.
        top_p: sample from the likeliest tokens of this total probability; None: from all.
        num_beams: width of the beam search; 1: none.
        max_new_tokens: longest answer in tokens.
        batch_size: questions that are answered at once.
        no_images: leave the images out: what the language model guesses from the question alone.
        count_visual_tokens: write the images' visual tokens, before and after reduction, into `metadata`.
        num_workers: processes that read images ahead of the device; None: four beside a GPU, none on the CPU.
        video_folder: where the questions' names of clips start from; empty: `image_folder`.
        num_frames, video_fps, max_frames: which frames of a clip are taken, see `llava.video.Sampling`; None: as the
            checkpoint was trained.
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
    num_workers: int | None = None
    video_folder: str = ""
    num_frames: int | None = None
    video_fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        get_template(self.conv_mode)
        self.sampling(None)
        if self.image_access not in IMAGE_ACCESS:
            raise ValueError(f"image_access={self.image_access!r}: choose {', '.join(IMAGE_ACCESS)}")
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: must be 0 (none) or above")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or above")

    def locations(self, question: Question) -> list[str]:
        """Paths or URLs of a question's images, without `no_images`.

        Raises:
            ValueError: one leads where `image_access` does not allow; the question is named.
        """
        names = () if self.no_images else question.images
        return [_of_question(question, locate_image, self.image_folder, name, self.image_access) for name in names]

    def video_locations(self, question: Question) -> list[str | list[str]]:
        """Paths or URLs of a question's clips, without `no_images`; of each frame, where it names them.

        Raises:
            ValueError: as `locations`.
        """
        clips = () if self.no_images else question.videos
        places = (self.video_folder, self.image_folder)
        return [_of_question(question, locate_video, places[0], clip, self.image_access, places[1]) for clip in clips]

    def sampling(self, config: Any) -> Sampling:
        """Which frames of a clip are taken for a model."""
        return Sampling.of_model(config, self.num_frames, self.video_fps, self.max_frames)


def _of_question(question: Question, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function for a question, which its ValueErrors then name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"question {question.question_id!r:.100}: {error}") from error


def check_images(questions: Sequence[Question], options: VqaOptions) -> None:
    """Look for all images and clips, so that a missing one is found before the model is opened.

    Raises:
        ValueError: the first one that is not there, with its question.
    """
    for question in questions:
        for location in options.locations(question):
            _of_question(question, check_image_exists, location)
        for clip in options.video_locations(question):
            _of_question(question, check_video_exists, clip)


@dataclass(frozen=True)
class Answer:
    """What a model says to a question.

    Attributes:
        text: the answer.
        visual_tokens: of each of the question's images and clips, before and after the reduction; None where not
            counted.
        text_tokens: of the prompt beside them.
        new_tokens: of the answer, with the one that ends it.
        tiles: of all its images, and frames of its clips, each of which the vision tower encodes.
    """

    text: str
    visual_tokens: list[tuple[int, int]] | None = None
    text_tokens: int = 0
    new_tokens: int = 0
    tiles: int = 0


@dataclass
class Batch:
    """Questions, ready for the model.

    Attributes:
        ids, mask: [B, S] int64, padded on the left.
        images: of all questions in order, [3, H, W] or [tiles, 3, H, W] each.
        sizes: their widths and heights in pixels.
        texts: B questions, for methods that read them.
        counts: images and clips of each question.
        videos: clips of all questions in order, [F, 3, H, W] each.
    """

    ids: Tensor
    mask: Tensor
    images: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)

    def pictures(self, vocab_size: int) -> tuple[list[Picture], list[tuple[int, int]]]:
        """Images and clips in the order in which the prompts have them, with their widths and heights.

        Args:
            vocab_size: the model's.
        """
        markers = find_markers(HostBatch.read(self.ids, self.mask, None), vocab_size)
        pictures, sizes = match_pictures(markers, self.images, self.sizes, self.videos)
        return cast("list[Picture]", pictures), sizes or []

    def of_questions(self, values: Iterable[T]) -> list[list[T]]:
        """One value for each image and clip, as a list for each question."""
        each = iter(values)
        return [list(islice(each, count)) for count in self.counts]

    def pin_memory(self) -> Batch:
        """In memory from which a GPU copies without waiting; the data loader calls it."""
        self.ids, self.mask = self.ids.pin_memory(), self.mask.pin_memory()
        self.images = [image.pin_memory() for image in self.images]
        self.videos = [clip.pin_memory() for clip in self.videos]
        return self


class Preparer:
    """Makes batches of questions, on the host: reads images and clips, renders prompts.

    Args:
        tokenizer, image_processor: of `load_pretrained_model`.
        config: the model's.
        options: see `VqaOptions`.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any, options: VqaOptions) -> None:
        self.tokenizer, self.image_processor, self.config, self.options = tokenizer, image_processor, config, options
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def prepare(self, questions: Sequence[Question]) -> Batch:
        """A batch of these questions.

        Raises:
            ValueError: an image or clip can't be read; the question is named.
        """
        groups, clips = [self._pictures(question) for question in questions], [self._clips(q) for q in questions]
        image_counts, clip_counts = list(map(len, groups)), list(map(len, clips))
        ids, mask = self._prompts(questions, image_counts, clip_counts)
        pictures = [picture for group in groups for picture in group]
        images = list(process_images(pictures, self.image_processor, self.config)) if pictures else []
        texts = [question.text for question in questions]
        sizes, counts = (
            [picture.size for picture in pictures],
            list(map(sum, zip(image_counts, clip_counts, strict=True))),
        )
        return Batch(ids, mask, images, sizes, texts, counts, [clip for group in clips for clip in group])

    def _pictures(self, question: Question) -> list[Image.Image]:
        """A question's images, those of files first; none with `no_images`."""
        files = [_of_question(question, open_image, place) for place in self.options.locations(question)]
        own = () if self.options.no_images else question.pictures
        return files + [_of_question(question, load_image, io.BytesIO(content), "in its row") for content in own]

    def _clips(self, question: Question) -> list[Tensor]:
        """The pixels of a question's clips, [F, 3, H, W] each."""
        sampling, name = self.options.sampling(self.config), f"question {question.question_id!r:.100}"
        places = self.options.video_locations(question)
        return [read_video(place, name, self.image_processor, self.config, sampling) for place in places]

    def _prompts(
        self, questions: Sequence[Question], image_counts: list[int], clip_counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask, [B, S]."""
        marked, mode = bool(getattr(self.config, "mm_use_im_start_end", False)), self.options.conv_mode
        rows = [
            build_prompt_ids(q.text, self.tokenizer, mode, images, mm_use_im_start_end=marked, num_videos=clips)
            for q, images, clips in zip(questions, image_counts, clip_counts, strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        return ids, mask


class Answerer:
    """A model with what it takes to answer a batch of questions.

    Args:
        tokenizer, model, image_processor: of `load_pretrained_model`.
        options: see `VqaOptions`.
    """

    def __init__(self, tokenizer: Any, model: Any, image_processor: Any, options: VqaOptions) -> None:
        self.tokenizer, self.model, self.options = tokenizer, model, options
        self.preparer = Preparer(tokenizer, image_processor, model.config, options)
        self._stop = get_template(options.conv_mode).stop
        stop_id = tokenizer.convert_tokens_to_ids(self._stop)
        self._eos = sorted({tokenizer.eos_token_id, stop_id} - {None, tokenizer.unk_token_id})

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each question."""
        return self.answer_batch(self.preparer.prepare(questions))

    def answer_all(self, batches: Sequence[Sequence[Question]]) -> Iterator[list[Answer]]:
        """Answers to batches of questions in their order; the next ones are prepared meanwhile.

        Raises:
            ValueError: an image or clip can't be read; the question is named.
        """
        for prepared in _load_ahead(self.preparer, batches, self.options, self.model.device.type == "cuda"):
            yield self.answer_batch(prepared)

    @torch.no_grad()
    def answer_batch(self, batch: Batch) -> list[Answer]:
        """An answer to each question of a batch."""
        device = self.model.device
        images, videos = ([one.to(device, non_blocking=True) for one in kind] for kind in (batch.images, batch.videos))
        ids, mask = batch.ids.to(device, non_blocking=True), batch.mask.to(device, non_blocking=True)
        spliced = self.model.splice_images(ids, mask, None, images, batch.sizes, batch.texts, left=True, videos=videos)
        new = self.model.generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            image_index=spliced.image_index,
            plan=spliced.plan,
            **self._generation(),
        )
        answers = [text.split(self._stop)[0].strip() for text in self._decode(new)]
        text_tokens = (batch.mask.sum(dim=1) - torch.tensor(batch.counts)).tolist()
        pictures, sizes = batch.pictures(self.model.config.vocab_size)
        tiles = tile_counts(pictures)
        visual = self._count(spliced.image_index, batch, pictures, sizes)
        counts = (visual, text_tokens, self._lengths(new), map(sum, batch.of_questions(tiles)))
        return [Answer(*each) for each in zip(answers, *counts, strict=True)]

    def _generation(self) -> dict[str, Any]:
        options = self.options
        sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
        return {
            "do_sample": options.temperature > 0,
            "num_beams": options.num_beams,
            "max_new_tokens": options.max_new_tokens,
            "eos_token_id": self._eos,
            "pad_token_id": self.preparer.pad,
            **sampling,
        }

    def _decode(self, new: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _lengths(self, new: Tensor) -> list[int]:
        """Tokens of each answer up to its end, of [B, S] new ones."""
        ended = torch.isin(new, torch.tensor(self._eos, device=new.device))
        ends = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, new.shape[1])
        lengths: list[int] = ends.tolist()
        return lengths

    def _count(
        self, image_index: Tensor, batch: Batch, pictures: Sequence[Picture], sizes: list[tuple[int, int]]
    ) -> Sequence[list[tuple[int, int]] | None]:
        """The visual tokens of each question's images and clips, or None for each."""
        if not self.options.count_visual_tokens:
            return [None] * len(batch.counts)
        if not pictures:
            return [[] for _ in batch.counts]
        after = torch.bincount(image_index[image_index >= 0], minlength=len(pictures)).tolist()
        is_clip = [isinstance(picture, Clip) for picture in pictures]
        before = self.model.get_model().layout_lengths(None, tile_counts(pictures), sizes, is_clip)
        return batch.of_questions(zip(before, after, strict=True))


class _Prepared(Dataset):
    """Batches by their number, prepared when they are asked for; or the error, for the main process to raise."""

    def __init__(self, preparer: Preparer, batches: Sequence[Sequence[Question]]) -> None:
        self._preparer, self._batches = preparer, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch | ValueError:
        try:
            return self._preparer.prepare(self._batches[number])
        except ValueError as error:
            return error


def _load_ahead(
    preparer: Preparer, batches: Sequence[Sequence[Question]], options: VqaOptions, on_gpu: bool
) -> Iterator[Batch]:
    workers = options.num_workers
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if on_gpu else 0
    loader: Iterable[Batch | ValueError] = DataLoader(
        _Prepared(preparer, batches), batch_size=None, num_workers=workers, pin_memory=on_gpu
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
