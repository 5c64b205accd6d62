"""The benchmarks: a file each, which says how to read its questions, how to ask and how to score."""

from __future__ import annotations

from difflib import get_close_matches

from llava.eval.tasks import toy
from llava.eval.tasks.base import Task
from llava.eval.tasks.choices import mmbench, mme, mmstar, pope, qbench, scienceqa, seed
from llava.eval.tasks.judged import llavabench, mmvet, video_qa
from llava.eval.tasks.short_answer import chartqa, docvqa, gqa, infovqa, ocrvqa, textvqa, vizwiz, vqav2

_FILES = (
    *(vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench, seed, llavabench, mmvet),
    *(mmstar, docvqa, infovqa, chartqa, ocrvqa, qbench, video_qa, toy),
)
TASKS: dict[str, Task] = {task.name: task for file in _FILES for task in file.TASKS}
"""All tasks by name."""


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none; the known ones are listed.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"no task {name!r}{hint}; known: {', '.join(TASKS)}")
    return TASKS[name]
