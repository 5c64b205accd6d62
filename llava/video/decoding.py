"""Frames of a video file, decoded by PyAV: those that are wanted, and no more than lead to them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image

from llava.pictures import UnfitImageError, check_size, quoted, reason, unreadable
from llava.video.errors import MissingReaderError, VideoError
from llava.video.sampling import Sampling
from llava.video.timeline import Timeline, read_timeline

logger = logging.getLogger(__name__)

_CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
_RAW_STREAMS = ("h264", "hevc", "m4v", "mpegvideo", "mjpeg")
FORMATS = _CONTAINERS + _RAW_STREAMS
"""What is read, by FFmpeg's names ("mov" is MP4 too, "matroska" WebM). No playlist or list of files is among
them: whoever writes such a one would choose what else is opened."""

_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
_WORTH_A_SEEK = 8  # frames: to decode fewer costs less than to seek and to fill the decoder again
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def read_file(
    file: str | BinaryIO, name: str, sampling: Sampling, threads: int = 1
) -> Iterator[tuple[Image.Image, int, float]]:
    """Frames of a video file, one after the other: picture (RGB, upright), number in the file, seconds since the first.

    One decoded frame is held at a time. A file that is cut off or damaged gives what can be decoded: frames are chosen
    among those whose data is there, and in the place of one that can't be decoded comes the next that can, or the last;
    a warning names the file.

    Args:
        file: its path, or the opened file, which can be sought in.
        name: what messages call it.
        sampling: which frames.
        threads: of the decoder.

    Raises:
        VideoError: there is no video in it, no frame can be decoded, or `sampling` takes too many.
        MissingReaderError: PyAV is not installed.
    """
    with _opened(file, name, threads) as (container, stream):
        timeline = read_timeline(container, stream, (_av().error.FFmpegError,))
    if not len(timeline):
        raise VideoError(f"video {quoted(name)} has a video stream without a frame; download it again, or remove it")
    try:
        numbers = sampling.indices(len(timeline), timeline.times)
    except ValueError as error:
        raise VideoError(f"video {quoted(name)}: {error}") from error
    with contextlib.closing(_Decoder(file, name, timeline, threads)) as decoder:
        picture, before = None, -1
        for number in numbers.tolist():
            if picture is None or number != before:
                picture, before = decoder.picture(number), number
            yield picture, number, float(timeline.times[number])
        decoder.warn()


class _Decoder:
    """Gives frames of a file by ascending numbers: reads on, or seeks where a later keyframe leads to the next one."""

    def __init__(self, file: str | BinaryIO, name: str, timeline: Timeline, threads: int) -> None:
        self.file, self.name, self.timeline, self.threads = file, name, timeline, threads
        self.damaged = 0
        self._seeks = True
        self._frame: Any = None  # the last one that was decoded, and its number
        self._at = -1
        self._stack = contextlib.ExitStack()
        self._open()

    def close(self) -> None:
        self._stack.close()

    def warn(self) -> None:
        if self.damaged:
            logger.warning(
                "video %s is damaged or cut off: %d part(s) of it could not be decoded, the nearest frames stand in",
                quoted(self.name),
                self.damaged,
            )

    def picture(self, number: int) -> Image.Image:
        """The frame of a number, not before that of the last call; the nearest one that can be decoded."""
        key, seeks = self.timeline.key_before(number)
        if key > self._at + _WORTH_A_SEEK and self._seeks:
            self._go_to(number, seeks)
        while self._at < number and self._step():
            pass
        if self._frame is None:
            raise VideoError(
                f"video {quoted(self.name)} has {len(self.timeline)} frame(s), none of which can be decoded; it is "
                "damaged, or in a codec that this PyAV does not know: download it again, convert it, or remove it"
            )
        return self._rgb(self._frame)

    def _open(self) -> None:
        self._stack.close()
        self._container, self._stream = self._stack.enter_context(_opened(self.file, self.name, self.threads))
        self._frames, self._frame, self._at = self._decoded(), None, -1

    def _begin_anew(self) -> None:
        """Decode from the start, and seek no more: seeking led astray."""
        self._seeks = False
        self._open()

    def _go_to(self, number: int, seeks: tuple[int, ...]) -> None:
        """Seek to a keyframe at or before a frame; where that leads astray, but for damage there, begin anew."""
        damaged = self.damaged
        for stamp in seeks:
            with contextlib.suppress(_av().error.FFmpegError):
                self._container.seek(stamp, stream=self._stream)
                self._frames, self._frame, self._at = self._decoded(), None, -1
                arrived = self._step()
                if arrived and (self.damaged > damaged or (self._at <= number and not self._frame.is_corrupt)):
                    return
        self._begin_anew()

    def _step(self) -> bool:
        """Decode one more frame; False at the end."""
        frame = next(self._frames, None)
        if frame is None:
            return False
        counted = self.timeline.stamps is None or frame.pts is None
        self._frame, self._at = frame, self._at + 1 if counted else self.timeline.number(frame.pts)
        return True

    def _decoded(self) -> Iterator[Any]:
        broken = _av().error.FFmpegError
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except broken:
                    self.damaged += 1
            return
        except broken:
            self.damaged += 1
        with contextlib.suppress(broken):
            yield from self._stream.codec_context.decode(None)  # what the decoder still has, where a file breaks off

    def _rgb(self, frame: Any) -> Image.Image:
        try:
            check_size((frame.width, frame.height))
        except UnfitImageError as error:
            raise VideoError(f"video {quoted(self.name)} {error}") from error
        picture: Image.Image = frame.to_image()
        turn = _TURNS.get(round(frame.rotation / 90) * 90 % 360)
        return picture if turn is None else picture.transpose(turn)


@contextlib.contextmanager
def _opened(file: str | BinaryIO, name: str, threads: int) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file.

    Raises:
        VideoError: it is no video that is read here.
    """
    av = _av()
    if not isinstance(file, str):
        file.seek(0)
    try:
        container = av.open(
            f"file:{file}" if isinstance(file, str) else file, options=_OPTIONS, metadata_errors="replace"
        )
    except (av.error.FFmpegError, OSError) as error:
        raise _unopened(file, name, error) from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            found = f"{len(container.streams.audio)} audio stream(s) only" if container.streams.audio else "no stream"
            raise VideoError(f"video {quoted(name)} has no pictures, {found}; name a file with video, or remove it")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(
                f"video {quoted(name)} is in a codec that this PyAV does not know; convert it to H.264, for instance"
            )
        stream.codec_context.thread_count = threads
        if threads != 1:
            stream.thread_type = "AUTO"
        yield container, stream


def _unopened(file: str | BinaryIO, name: str, error: Exception) -> VideoError:
    try:
        with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as content:  # noqa: PTH123
            content.seek(0)
            is_empty = not content.read(1)
    except OSError as refused:
        return VideoError(str(unreadable(name, refused, "video")))
    what = reason(Exception(getattr(error, "strerror", None) or error))
    found = "is empty" if is_empty else f"is no video that can be read, or is cut off ({what})"
    return VideoError(
        f"video {quoted(name)} {found}; expected MP4, WebM, Matroska, AVI, MPEG, FLV, ASF, Ogg or GIF: download it "
        "again, convert it, or remove it"
    )


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingReaderError("reading videos needs PyAV: pip install 'llava[video]'") from error
    return av
