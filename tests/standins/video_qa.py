"""Stand-ins of Video-LLaVA's files: questions about clips, each a folder of frames, and what asks the judge."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from PIL import Image

# In the form of the official program, with words of our own.
PROGRAM = """
import openai

def annotate(question, answer, pred):
    return openai.ChatCompletion.create(
        model="x",
        messages=[
            {"role": "system", "content": "You compare " "answers."},
            {"role": "user", "content": "Asked:\\n" f"{question} Right: {answer} "
             f"Given: {pred}\\n" "Reply as {'pred': 'yes', 'score': 4}."},
        ],
    )
"""


def write_clip(folder: Path, number: int, frames: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for frame in range(frames):
        color = (60 * number % 256, 90, 80 * frame % 256)
        Image.new("RGB", (40 + 8 * number, 50), color).save(folder / f"{frame}.png")


def make(part: str, clips: str, prefix: str, root: Path) -> None:
    """Four questions on two clips; the answers are in another order."""
    folder = root / "GPT_Zero_Shot_QA"
    for number in range(2):
        write_clip(folder / part / clips / f"{prefix}clip{number}.x", number)
    rows = [
        {"question_id": f"{prefix}{n}_0", "question": f"what happens in {n}?", "video_name": f"clip{n % 2}.x"}
        for n in range(4)
    ]
    answers = [{"question_id": f"{prefix}{n}_0", "answer": f"thing {n}", "type": 1} for n in reversed(range(4))]
    (folder / part / "test_q.json").write_text(json.dumps(rows))
    (folder / part / "test_a.json").write_text(json.dumps(answers))
    (folder / "eval_video_qa.py").write_text(PROGRAM)


STANDINS = {
    "msvd_qa": partial(make, "MSVD_Zero_Shot_QA", "videos", ""),
    "msrvtt_qa": partial(make, "MSRVTT_Zero_Shot_QA", "videos", ""),
    "activitynet_qa": partial(make, "Activitynet_Zero_Shot_QA", "all_test", "v_"),
    "tgif_qa": partial(make, "TGIF_Zero_Shot_QA", "mp4", ""),
}
