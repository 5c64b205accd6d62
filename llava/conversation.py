"""Prompt templates: how a conversation becomes the text that a language model reads.

A `Template` is an immutable description and a `Conversation` one dialogue written with it. Templates are
looked up by exact name in `conv_templates`; nothing here is rebound at run time, so two models with two
templates can live in one process.

A template renders to `Segment`s, pieces of text that say whether a model learns them. Joined, they are the
prompt; `llava.data.preprocessing` turns the same segments into labels, so the two cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN

Round = tuple[str, str | None]
"""A question and its answer; None where the answer is still to come."""


class SeparatorStyle(Enum):
    """LLaVA's names for how turns are separated: programs read off it which of `sep` and `sep2` ends an answer."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHATML = auto()
    LLAMA_3 = auto()


class Segment(NamedTuple):
    """A piece of a prompt, and whether it is learned (an answer with its end-of-turn token) or only read."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How one family of language models writes a conversation.

    A conversation reads ``[system] (round_open) question_open QUESTION question_close answer_lead ANSWER
    answer_close after_answer ...``. A model learns ``answer_lead ANSWER answer_close`` and reads the rest.

    Attributes:
        name: the first of the names in `conv_templates`.
        system: default system prompt; an empty one is left out together with what surrounds it.
        roles: names of the human's and the model's turns, as `Conversation.append_message` takes them.
        system_open, system_close: text around the system prompt.
        system_in_question: the system prompt stands inside the first question's marks, not in front of them.
        round_open: text before every round but the first.
        question_open, question_close: text around a question; the latter ends where the model begins.
        answer_lead: white space between `question_close` and the answer, learned with it.
        answer_close: end of an answer, learned with it; its stripped form is the stop string.
        after_answer: text after a finished answer, not learned.
        keeps_question: False for captions (plain): of the question, only its images are kept.
        sep, sep2, sep_style: LLaVA's names for separators, for code that reads them off a conversation.
    """

    name: str
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    system_open: str = ""
    system_close: str = ""
    system_in_question: bool = False
    round_open: str = ""
    question_open: str = ""
    question_close: str = ""
    answer_lead: str = ""
    answer_close: str
    after_answer: str = ""
    keeps_question: bool = True
    sep: str = ""
    sep2: str | None = None
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE

    def __post_init__(self) -> None:
        if not self.answer_close:
            raise ValueError(f"template {self.name!r}: answer_close is empty, so a model could not learn to stop")
        if self.question_close.endswith(" "):
            # A token never ends in a space that a word follows, so such a boundary would cut through a token.
            raise ValueError(
                f"template {self.name!r}: question_close {self.question_close!r} ends in a space; "
                "put that space into answer_lead"
            )

    @property
    def stop(self) -> str:
        """The string at which generation stops."""
        return self.answer_close.strip(" ")

    def copy(self) -> Conversation:
        """A fresh, empty conversation, so that LLaVA's ``conv_templates[name].copy()`` works."""
        return Conversation(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """The same as `copy`, for programs that write ``copy.deepcopy(conv_templates[name])``."""
        return self.copy()

    @property
    def version(self) -> str:
        """Name of the template, as of a conversation."""
        return self.name

    def render(self, rounds: Sequence[Round], system: str | None = None) -> list[Segment]:
        """Pieces of the prompt of `rounds`, in order.

        Args:
            rounds: (question, answer) pairs. A last answer of None ends the prompt where the model begins.
            system: replaces the template's system prompt; None keeps it.

        Raises:
            ValueError: an answer other than the last is None.
        """
        system = self.system if system is None else system
        head = f"{self.system_open}{system}{self.system_close}" if system else ""
        segments = []
        for index, (question, answer) in enumerate(rounds):
            if answer is None and index < len(rounds) - 1:
                raise ValueError(f"round {index} of {len(rounds)} has no answer; only the last may lack one")
            opening = self._opening(head if index == 0 else "", first=index == 0)
            segments.append(Segment(opening + self._question(question), False))
            if answer is not None:
                segments.append(Segment(self.answer_lead + answer + self.answer_close, True))
                segments.append(Segment(self.after_answer, False))
        return [segment for segment in segments if segment.text] if rounds else [Segment(head, False)]

    def _opening(self, head: str, first: bool) -> str:
        if not first:
            return self.round_open + self.question_open
        return self.question_open + head if self.system_in_question else head + self.question_open

    def _question(self, question: str) -> str:
        if not self.keeps_question:
            question = "".join(re.findall(f"{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}", question))
        return question + self.question_close


@dataclass
class Conversation:
    """One dialogue in a template, used as LLaVA's class of this name.

    >>> conv = conv_templates["vicuna_v1"].copy()
    >>> conv.append_message(conv.roles[0], "<image>\\nWhat is this?")
    >>> conv.append_message(conv.roles[1], None)
    >>> conv.get_prompt().endswith("What is this? ASSISTANT:")
    True
    """

    template: Template
    system: str | None = None
    messages: list[list[Any]] = field(default_factory=list)  # [role, text]; programs put an answer in later

    def __post_init__(self) -> None:
        if self.system is None:
            self.system = self.template.system

    @property
    def roles(self) -> tuple[str, str]:
        """Names of the human's and of the model's turns."""
        return self.template.roles

    @property
    def version(self) -> str:
        """Name of the template."""
        return self.template.name

    @property
    def sep(self) -> str:
        """LLaVA's first separator."""
        return self.template.sep

    @property
    def sep2(self) -> str | None:
        """LLaVA's second separator, None where the template has one only."""
        return self.template.sep2

    @property
    def sep_style(self) -> SeparatorStyle:
        """How the turns are separated, in LLaVA's words."""
        return self.template.sep_style

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end an answer, for `generate(stop_strings=...)`."""
        return [self.template.stop]

    def copy(self) -> Conversation:
        """An independent conversation with the same messages."""
        return Conversation(self.template, self.system, [list(message) for message in self.messages])

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        return self.copy()

    def append_message(self, role: str, text: str | None) -> None:
        """Add a turn. The turns alternate, human first; a text of None is the answer to be generated.

        Raises:
            ValueError: not this role's turn, or a question of None.
        """
        expected = self.roles[len(self.messages) % 2]
        if role != expected:
            raise ValueError(
                f"turn {len(self.messages)} of a {self.version!r} conversation belongs to {expected!r}, got {role!r}"
            )
        if text is None and len(self.messages) % 2 == 0:
            raise ValueError("a question cannot be None; only the model's turn may be left open")
        self.messages.append([role, text])

    def get_prompt(self) -> str:
        """The text so far; after a question, or an answer of None, it ends where the model begins."""
        questions = [text or "" for _, text in self.messages[0::2]]
        answers: list[str | None] = [text for _, text in self.messages[1::2]]
        answers += [None] * (len(questions) - len(answers))
        segments = self.template.render(list(zip(questions, answers, strict=True)), self.system)
        return "".join(segment.text for segment in segments)


_VICUNA = Template(
    name="v1",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_close=" ",
    question_open="USER: ",
    question_close=" ASSISTANT:",
    answer_lead=" ",
    answer_close="</s>",
    sep=" ",
    sep2="</s>",
    sep_style=SeparatorStyle.TWO,
)

_LLAVA_V1 = replace(
    _VICUNA,
    name="llava_v1",
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
)

_LLAVA_V0 = Template(
    name="llava_v0",
    system=_LLAVA_V1.system,
    roles=("Human", "Assistant"),
    system_close="###",
    question_open="Human: ",
    question_close="###Assistant:",
    answer_lead=" ",
    answer_close="###",
    sep="###",
)

_LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

_LLAVA_LLAMA_2 = Template(
    name="llava_llama_2",
    system=_LLAVA_SYSTEM,
    system_open="<<SYS>>\n",
    system_close="\n<</SYS>>\n\n",
    system_in_question=True,
    round_open="<s>",
    question_open="[INST] ",
    question_close=" [/INST]",
    answer_lead=" ",
    answer_close=" </s>",
    sep="<s>",
    sep2="</s>",
    sep_style=SeparatorStyle.LLAMA_2,
)

_LLAMA_2 = replace(
    _LLAVA_LLAMA_2,
    name="llama_2",
    system="You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in "
    "nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false "
    "information.",
)

# LLaVA-NeXT's Mistral: Llama-2's marks, no system prompt, and no <s> between rounds.
_MISTRAL = replace(_LLAVA_LLAMA_2, name="mistral_instruct", system="", round_open="", sep="")

_CHATML_DIRECT = Template(
    name="chatml_direct",
    system="Answer the questions.",
    roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>",
    question_open="<|im_start|>user\n",
    question_close="<|im_end|><|im_start|>assistant\n",
    answer_close="<|im_end|>",
    sep="<|im_end|>",
    sep_style=SeparatorStyle.MPT,
)

_MPT = replace(
    _CHATML_DIRECT,
    name="mpt",
    system="A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
)

# Qwen's own ChatML puts a line break after every <|im_end|>; LLaVA-NeXT's chatml_direct does not.
_QWEN = replace(
    _CHATML_DIRECT,
    name="qwen",
    system="You are a helpful assistant.",
    roles=("<|im_start|>user", "<|im_start|>assistant"),
    system_close="<|im_end|>\n",
    question_close="<|im_end|>\n<|im_start|>assistant\n",
    after_answer="\n",
    sep_style=SeparatorStyle.CHATML,
)

# <|begin_of_text|> is not written here: the tokenizer puts it in front, as it does <s> for the others.
_LLAMA_3 = Template(
    name="llama_3",
    system=_LLAVA_SYSTEM,
    roles=("user", "assistant"),
    system_open="<|start_header_id|>system<|end_header_id|>\n\n",
    system_close="<|eot_id|>",
    question_open="<|start_header_id|>user<|end_header_id|>\n\n",
    question_close="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    answer_close="<|eot_id|>",
    sep="<|eot_id|>",
    sep_style=SeparatorStyle.LLAMA_3,
)

_PLAIN = Template(
    name="plain",
    roles=("", ""),
    answer_close="\n",
    keeps_question=False,
    sep="\n",
    sep_style=SeparatorStyle.PLAIN,
)

conv_templates: Mapping[str, Template] = MappingProxyType(
    {
        "plain": _PLAIN,
        "v0_plain": _PLAIN,
        "v1": _VICUNA,
        "vicuna_v1": _VICUNA,
        "llava_v1": _LLAVA_V1,
        "llava_v0": _LLAVA_V0,
        "llama_2": _LLAMA_2,
        "llava_llama_2": _LLAVA_LLAMA_2,
        "mistral_instruct": _MISTRAL,
        "mistral_direct": _CHATML_DIRECT,
        "chatml": _CHATML_DIRECT,
        "chatml_direct": _CHATML_DIRECT,
        "mpt": _MPT,
        "qwen": _QWEN,
        "qwen_1_5": _QWEN,
        "qwen_2": _QWEN,
        "llama_3": _LLAMA_3,
        "llava_llama_3": _LLAMA_3,
    }
)
"""Every template by each of its names; read-only."""

default_conversation = _VICUNA
"""LLaVA's template where a program names none; `default_conversation.copy()` is a fresh conversation."""


def get_template(name: str) -> Template:
    """The template called `name`, matched exactly.

    Raises:
        ValueError: there is none; the message lists the known names.
    """
    template = conv_templates.get(name)
    if template is None:
        raise ValueError(f"unknown conversation template {name!r}; known: {', '.join(sorted(conv_templates))}")
    return template
