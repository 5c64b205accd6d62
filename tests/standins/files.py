"""Files of stand-ins."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


def picture(path: Path, number: int = 0) -> None:
    """A small picture of the format that the name says; its colours and width are those of the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32 + 8 * (number % 3), 32), (40 * number % 256, 90, 200))
    ImageDraw.Draw(image).rectangle((4, 4, 12 + number % 16, 20), fill=(250, 60 * number % 256, 30))
    image.save(path)


def json_file(path: Path, content: Any) -> None:
    """A file of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
