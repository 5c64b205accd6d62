"""ANLS, the measure of DocVQA and InfographicVQA: how near an answer's spelling is to a right one.

Paper: https://arxiv.org/abs/1907.00490. As the challenge's server computes it: https://rrc.cvc.uab.es/?ch=17.
"""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest letters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != other))
    return row[-1]


def anls(answer: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Similarity to the nearest right answer, 0 to 1, and 0 below the threshold.

    Case and the amount of space do not count, but the length is that of the texts as they are.

    Args:
        answer: the model's.
        answers: right ones, one at least.
        threshold: least similarity that counts.
    """
    nearest = max(_similarity(answer, right) for right in answers)
    return nearest if nearest >= threshold else 0.0


def _similarity(answer: str, right: str) -> float:
    length = max(len(right.upper()), len(answer.upper()))
    return 1 - edit_distance(_plain(right), _plain(answer)) / length if length else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
