"""What a sample is, {"id", "image" and "video" (optional), "conversations"}, and what is wrong with one."""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.conversation import Round, Template
from llava.data.preprocessing import ConversationError, NoTrainableTokensError, parse_rounds
from llava.data.records import DataError

FORMAT, TAGS, NO_ANSWER, IMAGE, VIDEO = "format", "image tags", "nothing to learn", "image", "video"
"""Kinds of defects: malformed, marks that do not match images or clips, no answer, an image or a clip that cannot be
read."""

MAX_IMAGES = 1000
"""Images of one sample; no model can take more."""

MAX_VIDEOS = 100
"""Clips of one sample."""


class BadSampleError(DataError):
    """A sample that cannot be trained on; the message names it.

    Attributes:
        kind: one of the kinds of defects above.
    """

    def __init__(self, message: str, kind: str = FORMAT) -> None:
        super().__init__(message)
        self.kind = kind


def sample_name(sample: Any, index: int, path: str) -> str:
    """What a message calls a sample: its id where it has one, and where it stands.

    Args:
        sample: as its file has it.
        index: its place in the file, from 0.
        path: of the file.
    """
    label = f"sample {sample['id']!r:.100}" if isinstance(sample, dict) and "id" in sample else "sample without id"
    return f"{label} (index {index} of {path})"


def image_files(sample: dict[str, Any], name: str) -> list[str]:
    """File names of a sample's images, in the order of their `<image>`; empty for text only.

    Raises:
        BadSampleError: `image` is neither a file name nor a list of them.
    """
    value = sample.get("image")
    if value is None:
        return []
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise BadSampleError(f'{name}: "image" is {value!r:.80}, expected a file name or a list of file names')
    if len(files) > MAX_IMAGES:
        raise BadSampleError(f"{name}: it has {len(files)} images, at most {MAX_IMAGES} are read")
    return files


def video_files(sample: dict[str, Any], name: str) -> list[str | list[str]]:
    """A sample's clips, in the order of their `<video>`: names of files or folders, or of a clip's frames; or empty.

    "video" is a name, or a list of clips; a clip that is a list of names is one of frames.

    Raises:
        BadSampleError: `video` is something else.
    """
    value = sample.get("video")
    if value is None:
        return []
    clips = [value] if isinstance(value, str) else value
    if not isinstance(clips, list) or not all(_is_name(clip) or _is_names(clip) for clip in clips):
        raise BadSampleError(
            f'{name}: "video" is {value!r:.80}, expected the name of a file or folder, or a list of clips, each such a '
            "name or a list of its frames' names"
        )
    if len(clips) > MAX_VIDEOS:
        raise BadSampleError(f"{name}: it has {len(clips)} videos, at most {MAX_VIDEOS} are read")
    return clips


def _is_name(clip: Any) -> bool:
    return isinstance(clip, str) and bool(clip)


def _is_names(clip: Any) -> bool:
    return isinstance(clip, list) and bool(clip) and all(map(_is_name, clip))


def with_clip_marks(sample: Any) -> Any:
    """A sample about clips alone with `<video>` for each, however its file marks them.

    LLaVA-Video's data has `<image>` there. Video-ChatGPT's has {"q", "a", "video_id"} in place of a conversation.
    """
    if not isinstance(sample, dict):
        return sample
    if "conversations" not in sample and {"q", "a", "video_id"} <= sample.keys():
        rest = {key: value for key, value in sample.items() if key not in ("q", "a", "video_id")}
        question = {"from": "human", "value": f"{DEFAULT_VIDEO_TOKEN}\n{sample['q']}"}
        said = [question, {"from": "gpt", "value": sample["a"]}]
        return {"id": sample["video_id"], "video": sample["video_id"], "conversations": said, **rest}
    turns = sample.get("conversations")
    if sample.get("video") is None or sample.get("image") is not None or not isinstance(turns, list):
        return sample
    if any(DEFAULT_VIDEO_TOKEN in str(turn.get("value")) for turn in turns if isinstance(turn, dict)):
        return sample

    def marked(turn: Any) -> Any:
        if not isinstance(turn, dict) or turn.get("from") != "human" or not isinstance(turn.get("value"), str):
            return turn
        return {**turn, "value": turn["value"].replace(DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN)}

    return {**sample, "conversations": [marked(turn) for turn in turns]}


def check_sample(sample: Any, name: str, template: Template) -> tuple[list[Round], list[str], list[str | list[str]]]:
    """Rounds, image files and clips of a sample, checked without opening the files.

    In a sample without images, `<image>` inside a text is text (a page of XML, say). At the start or end of a
    question it is taken for LLaVA's mark of an image that has been forgotten. So is `<video>` for clips.

    Args:
        sample: a decoded sample.
        name: what to call it in an error.
        template: what it will be written in.

    Raises:
        BadSampleError: a key is missing or of the wrong type, the conversation is malformed, or the number of
            marks is not the number of images or clips.
    """
    if not isinstance(sample, dict):
        raise BadSampleError(f"{name}: expected an object with 'conversations', got {sample!r:.80}")
    if "conversations" not in sample:
        raise BadSampleError(f"{name}: the key 'conversations' is missing; it has {sorted(sample)!r:.200}")
    files, clips = image_files(sample, name), video_files(sample, name)
    try:
        rounds = parse_rounds(sample["conversations"], template, bool(files), name, bool(clips))
    except NoTrainableTokensError as error:
        raise BadSampleError(str(error), NO_ANSWER) from error
    except ConversationError as error:
        raise BadSampleError(str(error)) from error
    questions = [question.strip() for question, _ in rounds]
    for tag, key, named in ((DEFAULT_IMAGE_TOKEN, "image", files), (DEFAULT_VIDEO_TOKEN, "video", clips)):
        count = sum(question.count(tag) for question in questions)
        marked = any(question.startswith(tag) or question.endswith(tag) for question in questions)
        if count != len(named) and (named or marked):
            raise BadSampleError(
                f"{name}: its questions have {count} {tag} and it names {len(named)} {key} file(s); "
                f'write one {tag} for each of "{key}"',
                TAGS,
            )
    return rounds, files, clips


def split_pictures(sample: Any) -> tuple[Any, list[bytes]]:
    """A sample whose images are named, and the contents of those that it holds itself, as Parquet files may.

    Such an image is a mapping {"bytes", "path"}, as `datasets` writes it; its name is the path, otherwise made up.
    """
    value = sample.get("image") if isinstance(sample, dict) else None
    images: list[Any] = value if isinstance(value, list) else [value]
    if not images or not all(map(_is_embedded, images)):
        return sample, []
    names = [image.get("path") or f"embedded image {number}" for number, image in enumerate(images)]
    contents = [image["bytes"] for image in images if image["bytes"]]
    return {**sample, "image": names}, contents if len(contents) == len(images) else []


def _is_embedded(image: Any) -> bool:
    return isinstance(image, dict) and "bytes" in image and isinstance(image["bytes"], bytes | None)
