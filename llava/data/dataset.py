"""LLaVA's training data: a JSON list, or JSON lines, of {"id", "image" (optional), "conversations"}.

All samples are checked once at construction, without opening an image, so that a mistake in a file is found
before a run has cost anything. What is kept of them is their JSON in one byte buffer: worker processes
share it, where a list of Python objects would be copied to each of them as reference counts change.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Round, Template, get_template
from llava.data.preprocessing import parse_rounds, preprocess
from llava.mm_utils import load_image, process_images

logger = logging.getLogger(__name__)

DataPath = str | Path | Sequence[str | Path]

IMAGE_LENGTH = 128
"""Words that an image counts for in `lengths`: LLaVA's allowance, used for grouping samples only."""


def split_data_path(data_path: DataPath) -> list[Path]:
    """The files named by one path, a list of paths, or a comma-separated string.

    Raises:
        ValueError: none is named, or one does not exist.
    """
    if isinstance(data_path, str) and not Path(data_path).is_file():
        data_path = [part.strip() for part in data_path.split(",") if part.strip()]
    paths = [Path(data_path)] if isinstance(data_path, str | Path) else [Path(path) for path in data_path]
    if not paths:
        raise ValueError("data_path is empty; name a JSON file of conversations")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"data file {str(path)!r} does not exist; check data_path")
    return paths


def read_samples(path: Path) -> Iterator[Any]:
    """Decoded samples of one file: JSON lines where its name ends in .jsonl, else one JSON list.

    Raises:
        ValueError: malformed JSON (with file, line and column), not UTF-8, or no list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 ({error}); convert it") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends in a file.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _decode(line, path, number)
        return
    samples = _decode(text, path, 1)
    del text
    if not isinstance(samples, list):
        raise ValueError(
            f"data file {str(path)!r} holds a JSON {type(samples).__name__}, expected a list of samples; "
            "name a file of JSON lines *.jsonl"
        )
    yield from samples


def _decode(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"data file {str(path)!r} is malformed JSON at line {line}, column {error.colno}: {error.msg}; "
            "mend that place, or write the file again if it was cut off"
        ) from error


def image_files(sample: dict[str, Any], name: str) -> list[str]:
    """File names of a sample's images, in the order of their `<image>`; empty for text only.

    Raises:
        ValueError: `image` is neither a file name nor a list of them.
    """
    value = sample.get("image")
    if value is None:
        return []
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise ValueError(f'{name}: "image" is {value!r:.80}, expected a file name or a list of file names')
    return files


def check_sample(sample: Any, name: str, template: Template) -> tuple[list[Round], list[str]]:
    """Rounds and image files of a sample, checked without opening the images.

    In a sample without images, `<image>` inside a text is text (a page of XML, say). At the start or end of a
    question it is taken for LLaVA's mark of an image that has been forgotten.

    Args:
        sample: a decoded sample.
        name: what to call it in an error.
        template: what it will be written in.

    Raises:
        ValueError: a key is missing or of the wrong type, the conversation is malformed, or the number of
            `<image>` is not the number of images.
    """
    if not isinstance(sample, dict):
        raise ValueError(f"{name}: expected an object with 'conversations', got {sample!r:.80}")
    if "conversations" not in sample:
        raise ValueError(f"{name}: the key 'conversations' is missing; it has {sorted(sample)}")
    files = image_files(sample, name)
    rounds = parse_rounds(sample["conversations"], template, bool(files), name)
    questions = [question.strip() for question, _ in rounds]
    tag = DEFAULT_IMAGE_TOKEN
    count = sum(question.count(tag) for question in questions)
    marked = any(question.startswith(tag) or question.endswith(tag) for question in questions)
    if count != len(files) and (files or marked):
        raise ValueError(
            f"{name}: its questions have {count} {tag} and it names {len(files)} image file(s); "
            f'write one {tag} for each file of "image"'
        )
    return rounds, files


class LazySupervisedDataset(Dataset[dict[str, Any]]):
    """Conversations about images, for supervised training; images are read when a sample is asked for.

    An item is a dict of `input_ids` and `labels` (LongTensor [S]), `images` (a tensor for each, in the order
    of their `<image>`: [3, H, W], or tiles [T, 3, H, W] with anyres), `image_sizes` ((width, height) in
    pixels), `text` (what a reducer that reads it is given, without `<image>`) and `id`.

    Args:
        data_path: a file, a list of files, or a comma-separated string of files.
        tokenizer: of the language model.
        image_processor: of the vision tower; may be None where no sample has an image.
        version: name of the prompt template.
        image_folder: folder that image files are looked up in.
        image_aspect_ratio: None or "square", "pad", "anyres"; see `llava.mm_utils.process_images`.
        image_grid_pinpoints: resolutions for anyres.
        mm_use_im_start_end: surround images by `<im_start>` and `<im_end>`.
        text: what `text` holds: "question", the human's words, a line a turn; or "conversation", all of the prompt
            with system prompt and answers.

    Raises:
        ValueError: see `read_samples` and `check_sample`; also an unknown template or image_aspect_ratio, and
            no samples at all. From an item: an image that cannot be read. All name the sample.
    """

    def __init__(
        self,
        data_path: DataPath,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        version: str,
        image_folder: str | Path | None = None,
        image_aspect_ratio: str | None = None,
        image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
        mm_use_im_start_end: bool = False,
        text: str = "question",
    ) -> None:
        if text not in ("question", "conversation"):
            raise ValueError(f"text={text!r}: choose question or conversation")
        self.text = text
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.version = version
        self.image_folder = Path(image_folder or "")
        self.mm_use_im_start_end = mm_use_im_start_end
        self._image_config = SimpleNamespace(
            image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=image_grid_pinpoints
        )
        self._paths = split_data_path(data_path)
        self._load(get_template(version))
        if (self._image_counts > 0).any():
            self._check_image_options()
        _warn_if_stop_is_unknown(get_template(version), tokenizer)

    def _load(self, template: Template) -> None:
        """Check every sample and keep its JSON, its file and its length."""
        buffer, ends, words, images, files = bytearray(), [0], [], [], []
        for file, path in enumerate(self._paths):
            for index, sample in enumerate(read_samples(path)):
                rounds, names = check_sample(sample, _name(sample, index, path), template)
                buffer += json.dumps(sample, ensure_ascii=False).encode("utf-8", "surrogatepass")
                ends.append(len(buffer))
                words.append(sum(len(text.split()) for turns in rounds for text in turns if text))
                images.append(len(names))
                files.append(file)
        if not files:
            raise ValueError(f"no samples in {', '.join(map(str, self._paths))}")
        self._json = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._words = np.asarray(words, dtype=np.int64)
        self._image_counts = np.asarray(images, dtype=np.int64)
        self._files = np.asarray(files, dtype=np.int64)
        logger.info("%d samples, %d with images", len(self), int((self._image_counts > 0).sum()))

    def _check_image_options(self) -> None:
        if self.image_processor is None:
            raise ValueError("the data has images, but there is no image_processor; set a vision tower")
        # Options that do not fit each other show with a blank image as well as with the first of the data.
        process_images([Image.new("RGB", (2, 2))], self.image_processor, self._image_config)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def lengths(self) -> list[int]:
        """Length of each sample in words, an image counting for `IMAGE_LENGTH`."""
        length: list[int] = (self._words + IMAGE_LENGTH * self._image_counts).tolist()
        return length

    @property
    def modality_lengths(self) -> list[int]:
        """`lengths`, negative for samples without an image, as LLaVA's sampler by modality wants them."""
        signs = np.where(self._image_counts > 0, 1, -1)
        length: list[int] = (signs * np.maximum(self.lengths, 1)).tolist()
        return length

    def sample(self, index: int) -> dict[str, Any]:
        """The sample as its file has it."""
        raw = self._json[self._ends[index] : self._ends[index + 1]].tobytes()
        decoded: dict[str, Any] = json.loads(raw.decode("utf-8", "surrogatepass"))
        return decoded

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        sample = self.sample(index)
        file = int(self._files[index])
        name = _name(sample, index - int(np.searchsorted(self._files, file)), self._paths[file])
        files = image_files(sample, name)
        images = [self._open(image_file, name) for image_file in files]
        ids, labels = preprocess(
            sample["conversations"],
            self.tokenizer,
            self.version,
            bool(files),
            mm_use_im_start_end=self.mm_use_im_start_end,
            sample=name,
        )
        return {
            "id": sample.get("id", index),
            "input_ids": ids,
            "labels": labels,
            "images": [self._process(image) for image in images],
            "image_sizes": [image.size for image in images],
            "text": self._text(sample["conversations"], bool(files)),
        }

    def _text(self, conversation: Sequence[dict[str, str]], has_image: bool) -> str:
        if self.text == "question":
            return _questions(conversation, has_image)
        template = get_template(self.version)
        segments = template.render(parse_rounds(conversation, template, has_image))
        return "".join(segment.text for segment in segments).replace(DEFAULT_IMAGE_TOKEN, "")

    def _open(self, file: str, name: str) -> Image.Image:
        try:
            return load_image(self.image_folder / file)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _process(self, image: Image.Image) -> torch.Tensor:
        return process_images([image], self.image_processor, self._image_config)[0]


def _name(sample: Any, index: int, path: Path) -> str:
    """What an error calls a sample: its id where it has one, and where it stands."""
    label = f"sample {sample['id']!r}" if isinstance(sample, dict) and "id" in sample else "sample without id"
    return f"{label} (index {index} of {path})"


def _questions(conversation: Sequence[dict[str, str]], has_image: bool) -> str:
    """The human's words, a line a turn; what a reducer that looks at the text is given."""
    texts = [turn["value"] for turn in conversation if turn["from"] == "human"]
    if has_image:
        texts = [text.replace(DEFAULT_IMAGE_TOKEN, "") for text in texts]
    return "\n".join(text.strip() for text in texts if text.strip())


def _warn_if_stop_is_unknown(template: Template, tokenizer: Any) -> None:
    stop = template.stop
    if stop.strip() and len(tokenizer(stop, add_special_tokens=False)["input_ids"]) != 1:
        logger.warning(
            "Template %r ends answers with %r, which is not one token of this tokenizer (its eos is %r): the "
            "model will not learn to stop. Choose the template of its family with --version.",
            template.name,
            stop,
            tokenizer.eos_token,
        )
