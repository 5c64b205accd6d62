"""VQA accuracy: how many annotators gave the same answer, after both are brought into one form.

The form is that of VQA's official program (https://visualqa.org/evaluation.html). LLaVA's evaluator, which is MMF's
M4C, does a little more before it (`normalize`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

# Three others who agree make an answer fully right.
ENOUGH = 3

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official program and LLaVA's pass the flag re.UNICODE as the number of periods to take out.
_PERIODS = int(re.UNICODE)
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A contraction is mended where one apostrophe is missing. The last one is as the official table has it.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def official_form(text: str) -> str:
    """An answer as VQA's official program compares it.

    Punctuation becomes a space, or nothing where a space is beside it anywhere in the answer or a number has a comma;
    periods stay before digits only; number words up to ten become digits; articles go; apostrophes come back.
    """
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(flat).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize(text: str) -> str:
    """An answer as LLaVA submits it and scores TextVQA: no commas, no question marks, `'s` set apart; then as above."""
    return official_form(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def agreement(answer: str, answers: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1: mean over the annotators of how many of the others gave this answer, up to three.

    Args:
        answer, answers: of the model and of the annotators, in one form.
    """
    same = [other == answer for other in answers]
    total = sum(same)
    return fmean(min(1.0, (total - own) / ENOUGH) for own in same)


def _without_punctuation(text: str) -> str:
    result, dropped = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if dropped or beside_space else " ")
    return _PERIOD.sub("", result, count=_PERIODS)
