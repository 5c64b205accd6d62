"""Clips: that the right frames of a file come out, upright and in a bounded memory, and what bad files say."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.media.videos import check_video_exists, locate_video, read_video
from llava.data.samples import VIDEO, BadSampleError, video_files
from llava.mm_utils import expand2square, process_images, process_video
from llava.video import MissingReaderError, Sampling, VideoError, decoding, read_clip
from llava.video.sampling import MAX_FRAMES, uniform_indices
from tests.test_dataset import processor

BITS, BLOCK = 4, 16  # a frame's number is drawn as 4 x 4 blocks of 16 pixels, black or white


def drawn(number: int, width: int = BITS * BLOCK, height: int = BITS * BLOCK) -> np.ndarray:
    """A frame that shows its number in its upper left corner, [height, width, 3]."""
    bits = (number >> np.arange(BITS * BITS)) & 1
    code = np.kron(bits.reshape(BITS, BITS), np.ones((BLOCK, BLOCK))) * 255
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    frame[: BITS * BLOCK, : BITS * BLOCK] = code[..., None]
    return frame


def number_in(picture: Image.Image) -> int:
    values = np.asarray(picture.convert("L"))[: BITS * BLOCK, : BITS * BLOCK]
    bits = values.reshape(BITS, BLOCK, BITS, BLOCK).mean(axis=(1, 3)).reshape(-1) > 127
    return int((bits << np.arange(BITS * BITS)).sum())


def write(
    path: Path,
    total: int = 50,
    codec: str = "mpeg4",
    rate: int | Fraction = 10,
    *,
    pixels: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    stamps: list[int] | None = None,
    turned: int | None = None,
    size: tuple[int, int] = (64, 64),
    options: dict[str, str] | None = None,
) -> Path:
    """A clip whose frames show their numbers; `stamps` are their times in thousandths of a second."""
    container_options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.max_b_frames = pixels, gop, b_frames
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turned is not None:
            stream.set_display_rotation(turned)
        for number in range(total):
            frame = av.VideoFrame.from_ndarray(drawn(number, *size), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(video: Any, **sampling: Any) -> list[int]:
    """The numbers that the frames show, which must be those that they are said to have."""
    frames = list(read_clip(video, Sampling(**sampling)))
    shown = [number_in(frame.picture) for frame in frames]
    assert shown == [frame.number for frame in frames]
    return shown


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory of this process in bytes after each frame that is decoded."""
    found: list[int] = []
    step = decoding._Decoder._step

    def counted(self: Any) -> bool:
        more = step(self)
        found.extend([int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")] * more)
        return more

    monkeypatch.setattr(decoding._Decoder, "_step", counted)
    return found


# Which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(50, 8), (8, 8), (3, 8), (1, 8), (7200, 8), (100, 1), (29, 16)])
def test_uniform_is_linspace_rounded_down(total: int, count: int) -> None:
    assert uniform_indices(total, count).tolist() == np.linspace(0, total - 1, count, dtype=int).tolist()
    assert Sampling(num_frames=count).indices(total, None).tolist() == uniform_indices(total, count).tolist()


def test_a_rate_goes_by_times() -> None:
    even = np.arange(100) / 25
    assert Sampling(fps=1).indices(100, even).tolist() == [0, 25, 50, 75]
    assert Sampling(fps=2, max_frames=4).indices(100, even).tolist() == uniform_indices(100, 4).tolist()
    assert Sampling(fps=1000).indices(100, even).tolist() == list(range(100)), "no frame twice"
    uneven = np.array([0, 0.1, 0.2, 0.9, 1.1, 5.0])
    assert Sampling(fps=1).indices(6, uneven).tolist() == [0, 3, 4, 5]  # 1.0 is as near to 0.9 as to 1.1
    assert Sampling(fps=1).indices(1, np.zeros(1)).tolist() == [0]
    ntsc = np.arange(3000) * 1001 / 30000
    assert Sampling(fps=1).indices(3000, ntsc)[:4].tolist() == [0, 30, 60, 90]


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 0}, {"num_frames": 2.5}, {"num_frames": True}, {"fps": 0}, {"fps": float("nan")},
              {"fps": "1"}, {"max_frames": -1}, {"num_frames": MAX_FRAMES + 1}]
)  # fmt: skip
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*expected"):
        Sampling(**wrong)
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*expected"):
        process_video([Image.new("RGB", (8, 8))], processor(), SimpleNamespace(image_aspect_ratio=None), **wrong)


def test_too_many_frames_ask_for_max_frames() -> None:
    with pytest.raises(ValueError, match="takes 5000 frames of it, at most 4096 are read; set max_frames"):
        Sampling(fps=1).indices(5000, np.arange(5000.0))


# Files -----------------------------------------------------------------------------------------------------------

KINDS = {
    "mpeg4.mp4": {},
    "h264.mp4": {"codec": "libx264", "b_frames": 2, "rate": 25},
    "h264.mkv": {"codec": "libx264", "b_frames": 2, "rate": Fraction(30000, 1001)},
    "h264.ts": {"codec": "libx264", "b_frames": 2, "rate": 25},
    "h264.flv": {"codec": "libx264"},
    "raw.h264": {"codec": "libx264"},
    "vp9.webm": {"codec": "libvpx-vp9", "rate": 12, "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx"},
    "ffv1.mkv": {"codec": "ffv1", "rate": 24},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "xvid.avi": {"b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "moving.gif": {"codec": "gif", "pixels": "rgb8"},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_right_frames_come_out(name: str, tmp_path: Path) -> None:
    settings = KINDS[name]
    if settings.get("codec", "mpeg4") not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {settings['codec']}")
    path = write(tmp_path / name, **settings)
    assert numbers(path) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert numbers(path, num_frames=2) == [0, 49]
    assert numbers(path, num_frames=50) == list(range(50))
    assert numbers(str(path), num_frames=3) == [0, 24, 49]
    with path.open("rb") as file:
        assert numbers(file, num_frames=3) == [0, 24, 49]


def test_times_and_rates(tmp_path: Path) -> None:
    path = write(tmp_path / "even.mp4", rate=10)
    frames = list(read_clip(path, Sampling(fps=2)))
    assert [frame.time for frame in frames] == pytest.approx([n / 2 for n in range(10)])
    assert numbers(path, fps=2) == list(range(0, 50, 5))
    assert numbers(path, fps=2, max_frames=4) == [0, 16, 32, 49]


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_a_variable_rate_goes_by_time_stamps(name: str, tmp_path: Path) -> None:
    stamps = [10 * n for n in range(30)] + [1000 + 500 * n for n in range(20)]  # 30 frames at once, then two a second
    path = write(tmp_path / name, stamps=stamps)
    assert numbers(path, num_frames=8) == [0, 7, 14, 21, 28, 35, 42, 49]
    frames = list(read_clip(path, Sampling(fps=1)))
    assert [number_in(frame.picture) for frame in frames] == [0, *range(30, 50, 2)]
    assert [frame.time for frame in frames] == pytest.approx([stamps[frame.number] / 1000 for frame in frames])


def test_a_clip_of_few_frames_repeats_them(tmp_path: Path) -> None:
    assert numbers(write(tmp_path / "one.mp4", 1)) == [0] * 8
    assert numbers(write(tmp_path / "three.mkv", 3)) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert numbers(tmp_path / "three.mkv", fps=1) == [0]


@pytest.mark.parametrize(("turned", "back"), [(90, 1), (180, 2), (-90, 3), (0, 0)])
def test_a_rotated_file_comes_upright(turned: int, back: int, tmp_path: Path) -> None:
    """`turned` degrees counterclockwise is what a player does to the stored frames."""
    path = write(tmp_path / "turned.mp4", 2, turned=turned, size=(128, 64))
    picture = next(read_clip(path)).picture
    assert picture.size == ((64, 128) if turned in (90, -90) else (128, 64))
    stored = drawn(0b1011, 128, 64)
    path = write_one(tmp_path / "other.mp4", stored, turned)
    found = np.asarray(next(read_clip(path)).picture).astype(int)
    assert np.abs(found - np.rot90(stored, back)).mean() < 8


def write_one(path: Path, values: np.ndarray, turned: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = values.shape[1], values.shape[0], "yuv420p"
        stream.set_display_rotation(turned)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    return path


# Cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv"])
def test_two_hours_for_eight_frames(name: str, tmp_path: Path, decoded: list[int]) -> None:
    still = {"sc_threshold": "1000000000"}  # no keyframe but those of the GOP
    path = write(tmp_path / name, 3600, rate=Fraction(1, 2), gop=200, size=(160, 120), options=still)
    frames = list(read_clip(path))
    assert [number_in(frame.picture) for frame in frames] == uniform_indices(3600, 8).tolist()
    assert frames[-1].time == pytest.approx(7198)
    assert len(decoded) <= 8 * 201, "only what leads from a keyframe to each frame"
    assert max(decoded) - min(decoded) < 16 << 20, "the frames between are not kept"


def test_a_file_with_one_keyframe_is_read_once(tmp_path: Path, decoded: list[int]) -> None:
    path = write(tmp_path / "one_key.mkv", 200, "libx264", gop=1000, options={"sc_threshold": "0"})
    assert numbers(path) == uniform_indices(200, 8).tolist()
    assert len(decoded) == 200


def test_pictures_are_decoded_alone(tmp_path: Path, decoded: list[int]) -> None:
    path = write(tmp_path / "keys.avi", 200, "mjpeg", pixels="yuvj420p")
    assert numbers(path) == uniform_indices(200, 8).tolist()
    assert len(decoded) == 8


def test_one_thread_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 5)
    with decoding._opened(str(path), "a", 1) as (_, stream):
        assert stream.codec_context.thread_count == 1


# Folders, lists, arrays ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 frames, 0.png to 49.png, and files that are none."""
    place = tmp_path / "frames"
    place.mkdir()
    for number in range(50):
        Image.fromarray(drawn(number)).save(place / f"frame{number}.png")
    (place / "notes.txt").write_text("no frame")
    (place / ".hidden.png").write_bytes(b"no frame")
    return place


def test_folder_list_and_array_give_what_the_file_gives(folder: Path, tmp_path: Path) -> None:
    wanted = numbers(write(tmp_path / "a.mp4"))
    paths = [folder / f"frame{number}.png" for number in range(50)]
    arrays = np.stack([drawn(number) for number in range(50)])
    clips = [
        folder, str(folder), paths, [str(path) for path in paths], [Image.open(path).convert("L") for path in paths],
        arrays, torch.from_numpy(arrays), torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255, arrays / 255.0,
    ]  # fmt: skip
    for clip in clips:
        assert numbers(clip) == wanted
        assert numbers(clip, fps=1, max_frames=5) == [0, 12, 24, 36, 49], (
            "pictures have no times: all, up to max_frames"
        )
        assert next(read_clip(clip)).time is None


def test_process_video(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", 50, "ffv1", pixels="bgr0", size=(96, 64))
    for ratio in (None, "square", "pad", "anyres"):
        config = SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=[[8, 16]])
        pixels = process_video(path, processor(), config)
        pictures = [Image.fromarray(drawn(number, 96, 64)) for number in uniform_indices(50, 8)]
        plain = SimpleNamespace(image_aspect_ratio="pad" if ratio == "pad" else None)
        wanted = process_images(pictures, processor(), plain)
        assert pixels.shape == wanted.shape
        assert pixels.ndim == 4 and pixels.shape[:2] == (8, 3) and pixels.dtype == torch.float32
        assert torch.allclose(pixels, torch.as_tensor(wanted), atol=0.02)
        assert torch.equal(process_video(pictures, processor(), config), torch.as_tensor(wanted))
    assert process_video(folder, processor(), SimpleNamespace(), num_frames=3).shape[0] == 3
    assert process_video(path, processor(), SimpleNamespace(), fps=1, max_frames=4).shape[0] == 4
    assert expand2square(pictures[0], 0).size == (96, 96)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ([], "is an empty list"),
        ([3], "frame 0 of video .* is int: expected a PIL picture or a path"),
        (["gone.png"], r"frame 0 of video .*'gone\.png' does not exist"),
        (np.zeros((2, 8, 8)), r"has the shape \(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"has the shape"),
        (np.full((1, 8, 8, 3), 7.0), "holds float64 from 7 to 7"),
        (np.full((1, 8, 8, 3), 7), "holds int64 from 7 to 7: expected uint8"),
        (3, "a video is int"),
        (None, "a video is NoneType"),
    ],
)
def test_what_is_no_clip(clip: Any, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        list(read_clip(clip))


# Bad files -------------------------------------------------------------------------------------------------------


def bad_files(place: Path) -> Iterator[tuple[Path, str]]:
    """Files and what is said of them."""
    good = write(place / "good.mp4").read_bytes()
    contents = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"these are words\n" * 100, "is no video that can be read"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "is no video that can be read"),
        "head.mp4": (good[:40], "has no pictures, no stream"),
        "playlist.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\ngood.mp4\n#EXT-X-ENDLIST\n", "is no video"),
        "list.mp4": (b"ffconcat version 1.0\nfile good.mp4\n", "is no video"),
    }
    for name, (content, message) in contents.items():
        (place / name).write_bytes(content)
        yield place / name, message
    yield write_sound(place / "sound.mp4"), r"has no pictures, 1 audio stream\(s\) only"
    index = good.index(b"mdat")
    (place / "rotten.mp4").write_bytes(good[: index + 4] + bytes(len(good) - index - 4))
    yield place / "rotten.mp4", "none of which can be decoded"
    (place / "no_frames").mkdir()
    yield place / "no_frames", "is a folder without a picture"
    os.mkfifo(place / "pipe.mp4")
    yield place / "pipe.mp4", "it is a pipe, socket or device"
    yield place / "gone.mp4", "does not exist"
    yield Path("x" * 300), "cannot be read"


def test_bad_files_are_named(tmp_path: Path) -> None:
    for path, message in bad_files(tmp_path):
        with pytest.raises(VideoError, match=message) as error:
            process_video(path, processor(), SimpleNamespace(image_aspect_ratio=None))
        assert f"video '{path}"[:60] in str(error.value)


def test_a_name_is_never_a_protocol(tmp_path: Path) -> None:
    good = write(tmp_path / "good.mp4")
    for name in (f"concat:{good}", f"cache:{good}", "http://localhost:1/a.mp4"):
        with pytest.raises(VideoError, match="does not exist"):
            list(read_clip(name))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.avi", "cut.ts"])
def test_of_a_file_cut_off_the_rest_is_sampled(name: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"whole{Path(name).suffix}", 50, gop=5).read_bytes()
    start = max(whole.find(b"mdat"), whole.find(b"movi"), 0)  # after which the frames come
    (tmp_path / name).write_bytes(whole[: start + (len(whole) - start) * 6 // 10])
    shown = [number_in(frame.picture) for frame in read_clip(tmp_path / name)]
    assert len(shown) == 8
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert 20 <= shown[-1] < 40


def test_damage_in_the_middle_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.mp4", 50, "libx264", gop=5)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    span = len(content) - start
    content[start + span // 3 : start + span // 2] = bytes(span // 2 - span // 3)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        frames = list(read_clip(path, Sampling(50)))
    assert [frame.number for frame in frames] == list(range(50))
    right = sum(number_in(frame.picture) == frame.number for frame in frames)
    assert 25 <= right < 50
    assert "a.mp4' is damaged or cut off" in caplog.text


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    path = write(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingReaderError, match=r"pip install 'llava\[video\]'"):
        list(read_clip(path))
    with pytest.raises(ImportError):  # no fault of the sample's
        read(str(path))
    assert len(list(read_clip(folder))) == 8


# Data ------------------------------------------------------------------------------------------------------------


def read(location: Any, **sampling: Any) -> torch.Tensor:
    config = SimpleNamespace(image_aspect_ratio="pad")
    return read_video(location, "sample 'a' (index 0 of a.json)", processor(), config, Sampling(**sampling))


def test_the_field_video() -> None:
    for value, clips in [
        (None, []),
        ("a.mp4", ["a.mp4"]),
        (["a.mp4", "b"], ["a.mp4", "b"]),
        ([["1", "2"]], [["1", "2"]]),
    ]:
        assert video_files({"video": value}, "x") == clips
    for value in (3, "", [""], [[]], [3], {"a": 1}, [["a", 3]]):
        with pytest.raises(BadSampleError, match='x: "video" is'):
            video_files({"video": value}, "x")
    with pytest.raises(BadSampleError, match="it has 101 videos"):
        video_files({"video": ["a"] * 101}, "x")


def test_where_names_lead(tmp_path: Path, folder: Path) -> None:
    place = str(tmp_path)
    assert locate_video("", "a.mp4", "folder", place) == f"{place}/a.mp4", "video_folder falls back to image_folder"
    assert locate_video(place, ["frames/1.png", "frames/2.png"]) == [f"{place}/frames/1.png", f"{place}/frames/2.png"]
    with pytest.raises(ValueError, match=r"video '\.\./a\.mp4' leaves the video folder"):
        locate_video(place, "../a.mp4")
    with pytest.raises(ValueError, match=r"video 'http://x/a\.mp4' is a URL"):
        locate_video(place, "http://x/a.mp4")
    assert locate_video(place, "http://x/a.mp4", "remote") == "http://x/a.mp4"


def test_clips_of_data_are_read_and_looked_for(tmp_path: Path, folder: Path) -> None:
    path = str(write(tmp_path / "a.mp4"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/clips/a.mp4", Path(path).read_bytes())
    for number in range(50):
        memory.pipe(f"/clips/frames/frame{number}.png", (folder / f"frame{number}.png").read_bytes())
    frames = [str(folder / f"frame{number}.png") for number in range(50)]
    for location in (path, "memory://clips/a.mp4"):
        check_video_exists(location)
        assert torch.equal(read(location), process_video(path, processor(), SimpleNamespace(image_aspect_ratio="pad")))
    for location in (str(folder), frames, "memory://clips/frames"):
        check_video_exists(location)
        assert torch.equal(read(location, num_frames=5), read(frames, num_frames=5))
    assert read(path, fps=1, max_frames=2).shape[0] == 2


def test_a_bad_clip_is_a_bad_sample(tmp_path: Path) -> None:
    for path, message in bad_files(tmp_path):
        with pytest.raises(BadSampleError, match=rf"^sample 'a' \(index 0 of a\.json\): .*{message}") as error:
            read(str(path))
        assert error.value.kind == VIDEO
    for gone in (str(tmp_path / "gone.mp4"), "memory://clips/gone.mp4", [str(tmp_path / "gone.png")]):
        with pytest.raises(ValueError, match="does not exist"):
            check_video_exists(gone)
        with pytest.raises(BadSampleError, match="does not exist"):
            read(gone)
    with pytest.raises(ValueError, match="without a picture"):
        check_video_exists(str(tmp_path / "no_frames"))


def test_a_store_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/clips/b.mp4", write(tmp_path / "b.mp4").read_bytes())

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise RuntimeError("the line is dead")

    monkeypatch.setattr(type(memory), "open", lambda self, path, mode: Failing(b"x" * 100))
    with pytest.raises(BadSampleError, match=r"b\.mp4' cannot be read \(the line is dead"):
        read("memory://clips/b.mp4")
