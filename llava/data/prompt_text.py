"""The question in a prompt that was rendered and tokenized before: what a reducer that reads the text is given."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.conversation import Template, conv_templates


def question_of_ids(ids: Tensor, tokenizer: Any) -> str:
    """The last question of a prompt.

    Args:
        ids: [S] int64, without padding, with IMAGE_TOKEN_INDEX or VIDEO_TOKEN_INDEX where an image or a clip goes.
        tokenizer: that the prompt was made with.

    Raises:
        ValueError: the prompt is in no known template.
    """
    pieces: list[list[int]] = [[]]
    for token in ids.tolist():
        if token in (IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX):
            pieces.append([])
        else:
            pieces[-1].append(token)
    return question_of_prompt("".join(tokenizer.decode(piece) for piece in pieces))


def question_of_prompt(prompt: str) -> str:
    """The last question of a prompt's text, without white space around it.

    Raises:
        ValueError: the prompt is in no known template.
    """
    found = [place for template in set(conv_templates.values()) if (place := _last_question(prompt, template))]
    if not found:
        raise ValueError(
            f"no question found in the prompt, which ends in {prompt[-40:]!r} and is in no known template; pass texts="
        )
    # Of templates with the same ending, the one whose marks enclose least has them right.
    return max(found)[1]


def _last_question(prompt: str, template: Template) -> tuple[int, str] | None:
    """Where the last question begins and what it is, if the prompt ends as this template's do."""
    if not template.question_open:
        return None
    opening, closing = _pattern(template.question_open), _pattern(template.question_close)
    end = re.search(closing + r"\s*$", prompt)
    openings = list(re.finditer(opening, prompt[: end.start()])) if end else []
    if not end or not openings:
        return None
    start = openings[-1].end()
    if template.system_in_question:
        system = re.search(_pattern(template.system_close), prompt[start : end.start()])
        start += system.end() if system else 0
    return start, prompt[start : end.start()].strip()


def _pattern(marks: str) -> str:
    """A template's marks with any white space between them: tokenizers decode it differently around special tokens."""
    return r"\s*".join(re.escape(part) for part in re.findall(r"<\|.*?\|>|[^\s<]+|<[^|\s]*", marks))
