"""The letter that an answer to a question with options means, as benchmarks' own programs read it.

Each rule is that of one program, so that figures can be put beside published ones. None is the result where it finds no
letter; that of another script, such as the full-width A of Chinese text, is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LETTERS = "ABCDE"
# How a letter stands as a word of its own in a sentence, the surest first.
_AS_A_WORD = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
# What announces an answer, in small letters.
_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_ANNOUNCED = (
    *(f"{start}{noun} is" for noun in _NOUNS for start in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# How a letter may stand anywhere, with how sure each makes it; at the start it is 10, at the end 9, announced 7.
_FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))


def list_options(options: Iterable[str]) -> list[str]:
    """A line for each option, with its letter: `A. red`."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def stated_letter(answer: str) -> str | None:
    """LLaVA's reading for ScienceQA: the letter alone, `A. ...` at the start, or one `The answer is A.` somewhere.

    `A.` alone is none, and neither is a small letter. Any character will do in place of the last period.
    """
    if answer in tuple(LETTERS):
        return answer
    first = re.match(rf"([{LETTERS}])\. ", answer)
    found = [first[1]] if first else re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def inferred_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's reading for MMBench: the only letter that is a word of the answer, or the only option in its text.

    Args:
        answer: what the model said.
        options: texts by letter.
    """
    words = answer.split()
    for form in _AS_A_WORD:
        named = [letter for letter in LETTERS if form.format(letter) in words]
        article = named == ["A"] and form == "{}" and len(words) > 3
        if len(named) == 1 and not article:
            return named[0]
    held = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


def likeliest_letter(answer: str, letters: str = "ABCD") -> str | None:
    """lmms-eval's reading for MMStar: of all places of letters the surest one, and the last of equally sure ones.

    Args:
        answer: what the model said.
        letters: of the options.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # how sure, where, which
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, 0, letter))
        places = [(7, text.find(letter, after)) for after in _announced(text)]
        places += [(sure, text.rfind(form.format(letter))) for sure, form in _FORMS]
        places += [(0, text.rfind(letter))]
        found += [(sure, place, letter) for sure, place in places if place >= 0]
    return max(found)[2] if found else None


def _announced(text: str) -> list[int]:
    """Where each announcement of an answer ends for the first time."""
    starts = ((text.lower().find(words), len(words)) for words in _ANNOUNCED)
    return [start + length for start, length in starts if start >= 0]
