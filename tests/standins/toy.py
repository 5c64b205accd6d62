"""A stand-in of the quickstart's held-out questions."""

from __future__ import annotations

from pathlib import Path

from tests.standins.short_answer import ASKED, KINDS, RIGHT, json_lines, picture


def toy(root: Path) -> None:
    """Five questions about three pictures."""
    folder = root / "toy"
    rows = [
        {"question_id": n, "image": f"heldout/{n // 2}.png", "text": text, "answer": right, "category": kind}
        for n, (text, right, kind) in enumerate(zip(ASKED, RIGHT, KINDS, strict=True))
    ]
    json_lines(folder / "heldout.jsonl", rows)
    for n in range(3):
        picture(folder / "images" / "heldout" / f"{n}.png", n)


STANDINS = {"toy": toy}
