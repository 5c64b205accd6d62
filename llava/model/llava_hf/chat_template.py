"""LLaVA's prompt templates as Jinja, for transformers' processors."""

from __future__ import annotations

import json
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Template


def line_break_after(marker: str, tokenizer: Any) -> str:
    """What to write between an image and the text below it, so that the line break has the ids of training.

    Training tokenizes the text after an image by itself, so it may begin with a space that the tokenizer puts in front.
    A tokenizer that puts it only in front of a whole prompt needs to be given it.
    """
    trained = tokenizer(f"{marker}\n", add_special_tokens=False).input_ids
    for text in ("\n", " \n"):
        if tokenizer(DEFAULT_IMAGE_TOKEN + marker + text, add_special_tokens=False).input_ids[1:] == trained:
            return text
    return "\n"


def chat_template(template: Template, mm_use_im_start_end: bool = False, line_break: str = "\n") -> str:
    """A Jinja chat template that writes what `Template.render` does, with `line_break` after each image.

    It takes transformers' messages; a first one of the role system replaces the template's own system prompt, and the
    images of a message come first, each on a line of its own, as in LLaVA. A prompt ends where the model begins, with
    or without `add_generation_prompt`: LLaVA's templates have no other end of a question.
    """
    image = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        image = f"{DEFAULT_IM_START_TOKEN}{image}{DEFAULT_IM_END_TOKEN}"
    first = "question_open + head" if template.system_in_question else "head + question_open"
    names = ("system_open", "system_close", "round_open", "question_open", "question_close", "answer_lead")
    texts = {name: getattr(template, name) for name in names}
    texts |= {"answer_end": template.answer_close + template.after_answer, "image": image + line_break}
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in texts.items()) + (
        _CHAT.replace("FIRST", first).replace("SYSTEM", json.dumps(template.system))
    )


_CHAT = """\
{%- macro text(message) -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images(message) -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- image -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = text(messages[0]) -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM -%}{%- set turns = messages -%}
{%- endif -%}
{%- set head = system_open + system + system_close if system else '' -%}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{- answer_lead + text(message) + answer_end -}}
{%- else -%}
{{- (FIRST) if loop.first else round_open + question_open -}}
{{- images(message) + text(message) + question_close -}}
{%- endif -%}
{%- endfor -%}
"""
