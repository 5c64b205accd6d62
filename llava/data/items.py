"""A row of the table to what the collator takes: ids, labels and pixels. Images are opened here, and only here."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.conversation import Template, get_template
from llava.data.feature_cache import FeatureCache, NotCachedError
from llava.data.media.images import IMAGE_ACCESS, check_image_exists, locate_image, open_image
from llava.data.media.videos import check_video_exists, locate_video, read_video
from llava.data.preprocessing import marks_of, parse_rounds, preprocess, without_marks
from llava.data.rejects import Rejects
from llava.data.samples import IMAGE, NO_ANSWER, VIDEO, BadSampleError, image_files, sample_name, video_files
from llava.data.stored_features import join_features
from llava.mm_utils import leading_ids, process_images
from llava.pictures import load_image
from llava.video import Sampling

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("stop", "skip")


class ItemMaker:
    """Makes items of rows; see `LazySupervisedDataset` for what an item is and for the arguments.

    Args:
        on_bad_sample: "stop" raises the `BadSampleError`; "skip" gives `placeholder` in the sample's place.
        rejects: where skipped samples are written; None: nowhere.

    Attributes:
        feature_cache: where the features are that items hold in place of pixels, as `StoredFeatures`; None: pixels.
    """

    feature_cache: FeatureCache | None = None

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        version: str,
        image_folder: str | Path | None,
        image_access: str = IMAGE_ACCESS[0],
        image_aspect_ratio: str | None,
        image_grid_pinpoints: str | Sequence[Sequence[int]] | None,
        mm_use_im_start_end: bool,
        text: str,
        on_bad_sample: str,
        rejects: Rejects | None,
        video_folder: str | Path | None = None,
        sampling: Sampling | None = None,
        mm_video_tower: str | None = None,
    ) -> None:
        if text not in ("question", "conversation"):
            raise ValueError(f"text={text!r}: choose question or conversation")
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(f"on_bad_sample={on_bad_sample!r}: choose {' or '.join(ON_BAD_SAMPLE)}")
        if image_access not in IMAGE_ACCESS:
            raise ValueError(f"image_access={image_access!r}: choose {', '.join(IMAGE_ACCESS)}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.version = version
        self.image_folder = str(image_folder or "")
        self.video_folder = str(video_folder or "")
        self.sampling = sampling or Sampling()
        self.image_access = image_access
        self.mm_use_im_start_end = mm_use_im_start_end
        self.text = text
        self.on_bad_sample = on_bad_sample
        self.rejects = rejects
        self._image_config = SimpleNamespace(
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=image_grid_pinpoints,
            mm_video_tower=mm_video_tower,
        )
        _warn_if_stop_is_unknown(get_template(version), tokenizer)

    def check_image_options(self) -> None:
        """Raise a ValueError for image options that do not fit each other, or where there is no image processor."""
        if self.image_processor is None:
            raise ValueError("the data has images, but there is no image_processor; set a vision tower")
        # Such options show with a blank image as well as with the first of the data.
        process_images([Image.new("RGB", (2, 2))], self.image_processor, self._image_config)

    def item(self, row: dict[str, Any], image_folder: str | None = None) -> dict[str, Any]:
        """The item of a row.

        Args:
            row: of a table.
            image_folder: where its images are; None: the run's.

        Raises:
            BadSampleError: it cannot be trained on, and bad samples stop the run.
        """
        try:
            return self._item(row, image_folder)
        except BadSampleError as error:
            if self.on_bad_sample == "stop":
                raise
            sample_id = _id(json.loads(row["sample"]), row["index"])
            if self.rejects is not None:
                self.rejects.add(sample_id, row["file"], row["index"], error)
            return self.placeholder(sample_id)

    def _item(self, row: dict[str, Any], image_folder: str | None) -> dict[str, Any]:
        if row["problem"] is not None:
            raise BadSampleError(row["problem"], row["kind"])
        sample = json.loads(row["sample"])
        name = sample_name(sample, row["index"], row["file"])
        look: Any = self._pixels if self.feature_cache is None else self._features
        images, sizes = look(row, image_folder, name)
        ids, labels = self.tokens(sample, name)
        return {
            "id": _id(sample, row["index"]),
            "input_ids": ids,
            "labels": labels,
            "images": images,
            "image_sizes": sizes,
            "videos": self._clips(row, image_folder, name),
            "text": self._text(sample["conversations"], bool(sizes), bool(video_files(sample, name))),
        }

    def _pixels(
        self, row: dict[str, Any], image_folder: str | None, name: str
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Pixels and (width, height) of each image of a row."""
        pixels, sizes = [], []
        for image in self.images(row, image_folder):
            try:
                pixels.append(self.process(image))
            except ValueError as error:
                raise BadSampleError(f"{name}: its image cannot be prepared: {error}", IMAGE) from error
            sizes.append(image.size)
        return pixels, sizes

    def _features(self, row: dict[str, Any], image_folder: str | None, name: str) -> tuple[Any, list[tuple[int, int]]]:
        """The same from the cache: no image is opened."""
        cache = self.feature_cache
        assert cache is not None
        try:
            found = [cache.read(picture) for picture in self.pictures(row, image_folder)]
        except NotCachedError as error:
            raise NotCachedError(f"{name}: {error}") from error  # no fault of the sample's: it is never skipped
        except ValueError as error:
            raise BadSampleError(f"{name}: {error}", IMAGE) from error
        return join_features([cache.empty(), *(features for features, _ in found)]), [size for _, size in found]

    def _clips(self, row: dict[str, Any], image_folder: str | None, name: str) -> list[torch.Tensor]:
        """Pixels of each clip of a row, [F, 3, H, W]."""
        if self.feature_cache is not None and self.clips(row, image_folder):
            raise NotCachedError(f"{name}: it shows a clip, and only images are cached; train without --feature_cache")
        return list(self.read_clips(row, image_folder, name))

    def placeholder(self, sample_id: object) -> dict[str, Any]:
        """An item of one token that teaches nothing: it keeps a skipped sample's place in its batch."""
        start = leading_ids(self.tokenizer) or [self.tokenizer.pad_token_id or 0]
        ids = torch.tensor(start, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE_INDEX)
        images: Any = [] if self.feature_cache is None else self.feature_cache.empty()
        return {
            "id": sample_id,
            "input_ids": ids,
            "labels": labels,
            "images": images,
            "image_sizes": [],
            "videos": [],
            "text": "",
        }

    def tokens(self, sample: dict[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels of a sample, LongTensor [S] each.

        Raises:
            BadSampleError: there is no token to learn.
        """
        try:
            ids, labels = preprocess(
                sample["conversations"],
                self.tokenizer,
                self.version,
                bool(image_files(sample, name)),
                mm_use_im_start_end=self.mm_use_im_start_end,
                sample=name,
                has_video=bool(video_files(sample, name)),
            )
        except BadSampleError:
            raise
        except ValueError as error:
            raise BadSampleError(str(error), NO_ANSWER) from error
        return ids, labels

    def pictures(self, row: dict[str, Any], image_folder: str | None = None) -> list[str | bytes]:
        """Paths or URLs of a row's images; their contents where it holds them itself.

        Raises:
            ValueError: one leads where `image_access` does not allow.
        """
        if row["pictures"]:
            return list(row["pictures"])
        folder = self.image_folder if image_folder is None else image_folder
        sample = json.loads(row["sample"])
        files = image_files(sample, sample_name(sample, row["index"], ""))
        return [locate_image(folder, file, self.image_access) for file in files]

    def clips(self, row: dict[str, Any], image_folder: str | None = None) -> list[str | list[str]]:
        """Paths or URLs of a row's clips; of each of its frames, where one is a list of them.

        Raises:
            BadSampleError: one leads where `image_access` does not allow.
        """
        sample = json.loads(row["sample"])
        name = sample_name(sample, row["index"], row["file"])
        images = self.image_folder if image_folder is None else image_folder
        try:
            files = video_files(sample, name)
            return [locate_video(self.video_folder, clip, self.image_access, images) for clip in files]
        except ValueError as error:
            raise BadSampleError(f"{name}: {error}", VIDEO) from error

    def read_clips(self, row: dict[str, Any], image_folder: str | None, name: str) -> Iterator[torch.Tensor]:
        """The pixels of a row's clips as the vision tower reads them, [F, 3, H, W], one after the other.

        Raises:
            BadSampleError: one cannot be read.
        """
        for clip in self.clips(row, image_folder):
            yield read_video(clip, name, self.image_processor, self._image_config, self.sampling)

    def images(self, row: dict[str, Any], image_folder: str | None = None) -> Iterator[Image.Image]:
        """A row's images, one after the other, read completely.

        Raises:
            BadSampleError: one cannot be read.
        """
        try:
            for number, picture in enumerate(self.pictures(row, image_folder)):
                yield open_picture(picture, number)
        except ValueError as error:
            name = sample_name(json.loads(row["sample"]), row["index"], row["file"])
            raise BadSampleError(f"{name}: {error}", IMAGE) from error

    def check_images(self, row: dict[str, Any], image_folder: str | None = None) -> None:
        """Look for a row's images and clips without opening them: the files, or what the cache has of them.

        Raises:
            NotCachedError: one is not in the cache.
            ValueError: one is missing, or leads where `image_access` does not allow.
        """
        for picture in self.pictures(row, image_folder):
            if self.feature_cache is not None:
                self.feature_cache.check(picture)
            elif isinstance(picture, str):
                check_image_exists(picture)
        for clip in self.clips(row, image_folder):
            check_video_exists(clip)

    def process(self, image: Image.Image) -> torch.Tensor:
        """The pixels of an image as the vision tower reads them, [3, H, W] or [tiles, 3, H, W]."""
        return process_images([image], self.image_processor, self._image_config)[0]

    def _text(self, conversation: Sequence[dict[str, str]], has_image: bool, has_video: bool) -> str:
        marks = marks_of(has_image, has_video)
        if self.text == "question":
            return _questions(conversation, marks)
        template = get_template(self.version)
        segments = template.render(parse_rounds(conversation, template, has_image, has_video=has_video))
        return without_marks("".join(segment.text for segment in segments), marks)


def open_picture(picture: str | bytes, number: int = 0) -> Image.Image:
    """An image of `ItemMaker.pictures`, read completely.

    Args:
        picture: its path or URL, or its content.
        number: of it among the row's, for a message about one that has no name.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(picture, bytes):
        return load_image(io.BytesIO(picture), f"embedded {number}")
    return open_image(picture)


def _id(sample: Any, index: int) -> Any:
    return sample.get("id", index) if isinstance(sample, dict) else index


def _questions(conversation: Sequence[dict[str, str]], marks: Iterable[str]) -> str:
    """The human's words, a line a turn; what a reducer that looks at the text is given."""
    texts = [without_marks(turn["value"], marks) for turn in conversation if turn["from"] == "human"]
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
