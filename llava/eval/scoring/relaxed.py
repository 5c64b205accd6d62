"""Relaxed accuracy, ChartQA's measure: a number may be off by 5 %, a text may not differ."""

from __future__ import annotations

TOLERANCE = 0.05


def relaxed_match(answer: str, right: str, tolerance: float = TOLERANCE) -> bool:
    """Whether an answer is right, as Pix2Struct, Qwen-VL, lmms-eval and VLMEvalKit decide.

    Both as numbers, 12 % being 0.12: relative difference up to `tolerance`. Otherwise, and where 0 is right: the same
    text but for case. A number with thousands separators is a text.
    """
    given, true = _number(answer), _number(right)
    if given is None or not true:
        return answer.lower() == right.lower()
    return abs(given - true) / abs(true) <= tolerance


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
