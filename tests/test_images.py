"""Image files: what is read and how it becomes RGB, what is refused, and that nothing waits or loads without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava.data.images import load_image


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
