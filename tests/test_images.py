"""Image files: what is read and how it becomes RGB, what is refused, and that nothing waits or loads without end."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from llava import pictures
from llava.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.data.media.images import check_image_exists, locate_image, open_image
from llava.data.samples import MAX_IMAGES, BadSampleError
from llava.pictures import load_image, to_rgb
from llava.train.preflight.findings import Report
from llava.train.preflight.samples import check_images_exist, check_samples
from tests.test_dataset import Letters, processor, turns
from tests.tiny_world import run_python

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture(autouse=True)
def no_endless_wait() -> Iterator[None]:
    """End a test that waits for a pipe or reads a device."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("it waits without end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# Modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (GREY.astype(np.uint16) * 257, "16.png"),
        (GREY.astype(np.uint16) * 256, "16.tif"),
        (GREY.astype(">u2") * 257, "big_endian.tif"),
        (GREY.astype(np.uint16) * 257, "16.jp2"),
        (GREY.astype(np.int32) * 257, "32.tif"),
        (GREY.astype(np.int32), "32_holds_8.tif"),
        (GREY.astype(np.int32) * 257, "16.pgm"),
        (GREY.astype(np.float32) / 255, "float.tif"),
    ],
)
def test_greys_of_more_than_8_bits_keep_their_shades(values: np.ndarray, name: str, tmp_path: Path) -> None:
    image = load_image(saved(Image.fromarray(values), tmp_path / name))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([GREY] * 3, axis=-1))


def test_white_that_is_zero(tmp_path: Path) -> None:
    """TIFF may count from white to black; Pillow turns 8 bits around, and not 16."""
    path = saved(Image.fromarray(GREY.astype(np.uint16) * 257), tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(path) as image:
        assert (image.mode, image.tag_v2[262]) == ("I;16", 0)
    assert np.array_equal(np.asarray(load_image(path))[..., 0], 255 - GREY)


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), 255, np.float32),
        np.full((4, 4), -0.1, np.float32),
        np.full((4, 4), -1, np.int32),
        np.full((4, 4), 1 << 16, np.int32),
    ],
)
def test_numbers_without_a_known_white_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    path = saved(Image.fromarray(values), tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=r"odd\.tif' holds (floats|integers) from .* expected"):
        load_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes_become_what_llava_makes_of_them(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert(mode) if mode in ("LA", "PA", "1") else image
    image = Image.frombytes("LAB", (8, 8), noise.tobytes()) if mode == "LAB" else image.convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_modes_with_multiplied_colours(mode: str) -> None:
    whole = Image.new(mode[:-1] + "A", (2, 2), (10, 255) if mode == "La" else (10, 10, 10, 255))
    assert to_rgb(whole.convert(mode)).getpixel((0, 0)) == (10, 10, 10)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_palettes_with_transparency_give_their_colours_without_a_warning(
    transparency: int | bytes, tmp_path: Path
) -> None:
    image = Image.fromarray(GREY).convert("P")
    path = saved(image, tmp_path / "palette.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(image.convert("RGB")))


def test_load_image_converts_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.effect_noise((64, 64), 50).save(grey)
    assert load_image(grey).mode == "RGB"
    with pytest.raises(ValueError, match=r"gone\.png.*does not exist; check"):
        load_image(tmp_path / "gone.png")
    for suffix in ("png", "jpg"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.effect_noise((64, 64), 50).save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}.*truncated"):
            load_image(cut)
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png.*no format that Pillow reads"):
        load_image(text)
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)


def test_orientation_in_exif_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 2)


# What is refused -------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """The beginning of a picture that says it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


REFUSED = {
    "pipe.png": "a pipe, socket or device, not a file",
    "socket.png": "a pipe, socket or device, not a file",
    "zero.png": "a pipe, socket or device, not a file",
    "folder.png": "it is a folder",
    "loop.png": "cannot be read",
    "dangling.png": "does not exist",
    "n" * 300: "File name too long",
    "nul\0.png": "cannot be read",
    "\ud800.png": "(cannot be read|does not exist)",
    "sparse.png": "more than 512 MiB",
    "empty.png": "no format that Pillow reads",
    "page.eps": "no format that Pillow reads",
    "bomb.png": "has too many pixels",
    "half_bomb.png": "is 10000 x 10000 pixels",
    "line.png": "is 1 x 60000 pixels",
    "long.png": "is 25000 x 200 pixels",
    "http://127.0.0.1:9/x.png": "is a URL.*--image_access remote",
    "file:///dev/zero": "is a URL.*--image_access remote",
    "/dev/zero": "leaves the image folder .*--image_access disk",
    "../images/../data.json": "leaves the image folder .*--image_access disk",
}
"""Image names, and what the error says about them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, good ones and those of `REFUSED`."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    Image.new("RGB", (20, 10), "red").save(folder / "red.png")
    Image.new("RGB", (20, 10), "red").save(folder / "page.eps")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the name of a socket must be short
        listener.bind("socket.png")
    for link, target in (("zero.png", "/dev/zero"), ("loop.png", "loop.png"), ("dangling.png", "gone")):
        (folder / link).symlink_to(target)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "empty.png").touch()
    sizes = {"bomb": (100_000, 100_000), "half_bomb": (10_000, 10_000), "line": (1, 60_000), "long": (25_000, 200)}
    for name, size in sizes.items():
        (folder / f"{name}.png").write_bytes(png_of(*size))
    return folder


def dataset(folder: Path, samples: Any, **options: Any) -> LazySupervisedDataset:
    """The data of some samples, or of a file."""
    path = folder.parent / "data.json"
    if isinstance(samples, Path):
        path = samples
    else:
        path.write_text(json.dumps(samples))
    settings = {"version": "v1", "image_folder": folder, "image_aspect_ratio": "pad"}
    return LazySupervisedDataset(path, Letters(), processor(), **{**settings, **options})


def about(image: Any, sample_id: Any = "x", count: int = 1) -> dict[str, Any]:
    return {"id": sample_id, "image": image, "conversations": turns("<image>" * count + "\nWhat?", "red")}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_sample_and_file(name: str, folder: Path) -> None:
    data = dataset(folder, [about(name)])
    with pytest.raises(BadSampleError, match=rf"(?s)^sample 'x' \(index 0 of .*\): image .*{REFUSED[name]}") as caught:
        data[0]
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_images_are_skipped_and_the_doctor_finds_them(folder: Path) -> None:
    samples = [about(name) for name in REFUSED] + [about("red.png")]
    data = dataset(folder, samples, on_bad_sample="skip")
    assert [len(data[index]["images"]) for index in range(len(data))] == [0] * len(REFUSED) + [1]
    quick, whole = Report(), Report()
    check_images_exist(data, quick, seconds=60)
    check_samples(data, whole, None, 2048)
    unopened = len(REFUSED) - len(["empty", "eps", "bomb", "half_bomb", "line", "long"])
    assert f"{unopened} samples" in quick.findings[0].message
    assert f"{len(REFUSED)} samples" in whole.findings[0].message


def test_links_out_of_the_folder_are_their_owners_wish(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "coco").symlink_to(folder)
    assert open_image(locate_image(str(tmp_path), "coco/red.png")).size == (20, 10)
    inside = locate_image(str(folder), f"{folder}/red.png")  # an absolute name of the same place
    assert open_image(inside).size == (20, 10)


@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("{0}/red.png", "disk"),
        ("../images/red.png", "disk"),
        ("{0}/red.png", "remote"),
        ("file://{0}/red.png", "remote"),
    ],
)
def test_access_may_be_widened(name: str, access: str, folder: Path) -> None:
    (folder.parent / "other").mkdir(exist_ok=True)
    data = dataset(folder, [about(name.format(folder))], image_folder=folder.parent / "other", image_access=access)
    assert data[0]["image_sizes"] == [(20, 10)]


def test_without_an_image_folder_any_file_may_be_named(folder: Path) -> None:
    assert dataset(folder, [about(f"{folder}/red.png")], image_folder=None)[0]["image_sizes"] == [(20, 10)]
    with pytest.raises(BadSampleError, match="--image_access remote"):
        dataset(folder, [about("memory://red.png")], image_folder=None)[0]


def test_unknown_access() -> None:
    with pytest.raises(ValueError, match=r"image_access='all': choose folder, disk, remote"):
        dataset(Path("/tmp"), [about(None, count=0)], image_access="all")


# Places and contents that are not files ----------------------------------------------------------------------------


@pytest.fixture
def store(folder: Path) -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.pipe("/images/red.png", (folder / "red.png").read_bytes())
    yield system
    system.store.clear()


def test_remote_images(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate_image("memory://images", "red.png")  # the user has named this place
    check_image_exists(place)
    assert open_image(place).size == (20, 10)
    assert locate_image("any", "memory://images/red.png", "remote") == place
    for name in ("../red.png", "a/../../red.png", "red.png::file:///etc/passwd", "x::y"):
        with pytest.raises(ValueError, match=r"(leaves the image folder|is a URL)"):
            locate_image("memory://images", name)
    for look in (check_image_exists, open_image):
        with pytest.raises(ValueError, match="does not exist"):
            look("memory://images/gone.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(ValueError, match=r"red\.png' has more than"):
        open_image(place)


class Slowly(io.BytesIO):
    """A file that comes in parts, as from a web server that does not say how long it is."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 10))


def test_a_remote_image_that_comes_in_parts(store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (folder / "red.png").read_bytes()
    monkeypatch.setattr(type(store), "open", lambda self, path, mode: Slowly(content))
    assert open_image("memory://images/red.png").size == (20, 10)
    monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(ValueError, match="has more than"):
        open_image("memory://images/red.png")


@pytest.mark.parametrize("name", ["simplecache::memory://x", "zip://a.png::/dev/zero", "weird://x", "file:///dev/zero"])
def test_remote_is_no_way_to_what_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"image '{name[:4]}.*(chain of URLs|cannot be read)|'/dev/zero' cannot be"):
        open_image(locate_image("folder", name, "remote"))


def test_errors_of_an_object_store_name_the_image(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no credentials")

    for name in ("exists", "open"):
        monkeypatch.setattr(type(store), name, fail)
    for look in (check_image_exists, open_image):
        with pytest.raises(ValueError, match=r"memory://images/red\.png' cannot be read \(no credentials\)"):
            look("memory://images/red.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_embedded_images_have_the_same_limits(folder: Path, tmp_path: Path) -> None:
    page = (folder / "page.eps").read_bytes()
    for content, reason in ((b"junk", "no format"), (page, "no format"), (png_of(10_000, 10_000), "10000 x 10000")):
        path = tmp_path / f"{len(content)}.parquet"
        pq.write_table(pa.Table.from_pylist([about({"bytes": content, "path": "a.png"})]), path)
        with pytest.raises(BadSampleError, match=rf"sample 'x' .*: image 'embedded 0' .*{reason}"):
            dataset(folder, path)[0]


@pytest.mark.parametrize(
    "image",
    [5, True, "", [[]], [None], {}, {"path": "red.png"}, {"bytes": "text", "path": "a"}, {"bytes": 5}, ["red.png", ""]],
)
def test_odd_entries_are_named(image: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sample 'x' \(index 0 of .*\): \"image\" is .*, expected a file name"):
        dataset(folder, [about(image)])
    assert dataset(folder, [about(image), about("red.png")], on_bad_sample="skip")[0]["images"] == []


def test_a_sample_has_a_limit_of_images(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"it has {MAX_IMAGES + 1} images, at most {MAX_IMAGES}"):
        dataset(folder, [about(["red.png"] * (MAX_IMAGES + 1), count=MAX_IMAGES + 1)])


def test_a_limit_of_bytes_holds_for_opened_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(ValueError, match="image 'embedded' has more than"):
        load_image(io.BytesIO((folder / "red.png").read_bytes()), "embedded")


# Data workers ------------------------------------------------------------------------------------------------------


def test_an_error_of_a_worker_is_that_of_the_sample(folder: Path) -> None:
    data = dataset(folder, [about("red.png"), about("pipe.png")])
    with pytest.raises(BadSampleError) as expected:
        data[1]
    loader = DataLoader(data, num_workers=1, collate_fn=DataCollatorForSupervisedDataset(Letters()))
    with pytest.raises(BadSampleError) as caught:
        list(loader)
    assert str(caught.value) == str(expected.value)


ENDS_WITH_WORKERS = """
from torch.utils.data import DataLoader
from llava.train.launching.stop import ignore_signals

batches = iter(DataLoader(range(8), num_workers=2, worker_init_fn=ignore_signals))
next(batches)
"""


def test_a_run_that_ends_with_workers_says_nothing_of_them() -> None:
    """They are killed, and torch would raise an error for each after the line that says why the run ended."""
    done = run_python("-c", ENDS_WITH_WORKERS)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
