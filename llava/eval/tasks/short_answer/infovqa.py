"""InfographicVQA: questions about infographics, of DocVQA's challenge; read, asked and scored as DocVQA.

Paper: https://arxiv.org/abs/2104.12756
"""

from __future__ import annotations

from llava.eval.tasks.base import Needed
from llava.eval.tasks.short_answer.docvqa import CHALLENGE, AnsweredDocuments, SubmittedDocuments

_VAL, _TEST = "infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_test_v1.0.json"


def _needs(file: str) -> tuple[Needed, ...]:
    return (
        Needed(file, f"{CHALLENGE}, InfographicVQA, annotations"),
        Needed("infographicsvqa_images", f"{CHALLENGE}, InfographicVQA, images"),
    )


TASKS = (
    AnsweredDocuments(
        name="infovqa",
        title="InfoVQA (val)",
        folder="infovqa",
        needs=_needs(_VAL),
        main="anls",
        published={"InfoVQA": "anls"},
        images="infographicsvqa_images",
        file=_VAL,
        image_key="image_local_name",
    ),
    SubmittedDocuments(
        name="infovqa_test",
        title="InfoVQA (test)",
        folder="infovqa",
        needs=_needs(_TEST),
        main=None,
        images="infographicsvqa_images",
        file=_TEST,
        image_key="image_local_name",
    ),
)
