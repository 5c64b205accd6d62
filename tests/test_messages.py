"""What a command shows on the terminal, and what goes to the log of its run."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_world import run_python

# A process of a run, in which libraries speak in every way that they have.
PROGRAM = """
import logging, os, sys, warnings
from llava.train.launching.process import open_run_log, set_up_logging

set_up_logging()
from transformers.utils import logging as of_transformers

def speak(when):
    print("printed", when)
    os.system(f"echo printed by a child {when}")
    warnings.warn(f"warned {when}", FutureWarning)
    logging.getLogger("some.library").info("informed %s", when)
    of_transformers.get_logger("transformers.x").warning("advised %s", when)
    logging.getLogger("llava.x").info("said %s", when)

speak("early")
open_run_log(sys.argv[1])
speak("late")
list(of_transformers.tqdm(range(3), desc="Loading weights"))
logging.getLogger("some.library").error("broken")
logging.getLogger("llava.x").warning("beware")
"""


def test_libraries_speak_to_the_log(tmp_path: Path) -> None:
    result = run_python("-c", PROGRAM, tmp_path)
    assert result.returncode == 0, result.stderr
    log = tmp_path / "logs" / "rank-0.log"
    shown = [line.split(" ", 1)[1] for line in result.stderr.splitlines()]
    named = f"what libraries say goes to {log}, each step to metrics.jsonl"
    assert shown == ["said early", named, "said late", "ERROR: broken", "WARNING: beware"]
    assert result.stdout == ""
    kept = log.read_text()
    for text in ("printed", "printed by a child", "warned", "informed", "advised", "said"):
        assert all(f"{text} {when}" in kept for when in ("early", "late")), text
    assert "broken" in kept
