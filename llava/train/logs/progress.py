"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import logging
import math
import sys
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback

logger = logging.getLogger(__name__)

LINES = 20  # a run, where there is no terminal
_LINE = "step {n_fmt}/{total_fmt} ({percentage:.0f} %){postfix}, {elapsed} since the start, {remaining} left"


class TrainingBar(ProgressCallback):
    """One bar with the last loss, whose time left is right in a run that goes on from a checkpoint too.

    Every line of log is in metrics.jsonl; here stand those without a loss only: evaluation, and the summary.

    Args:
        bar: draw a bar; otherwise a line is logged every few per cent. Default: where stderr is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        super().__init__()
        self.draws = sys.stderr.isatty() if bar is None else bar
        self._said = 0  # the step of the last line

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            hidden: dict[str, Any] = {"file": io.StringIO(), "mininterval": math.inf, "bar_format": _LINE}
            shown = {"dynamic_ncols": True} if self.draws else hidden
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", **shown)
        self.current_step = self._said = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say a line where one is due: only now the loss of the step before is known."""
        now, before = (step * LINES // state.max_steps for step in (state.global_step, self._said))
        if self.training_bar is not None and now > before:
            self._say(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A bar of its own for an evaluation, on a terminal."""
        if self.draws:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss beside the bar; results of an evaluation and of the run on a line of their own."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        elif "train_runtime" in logs:
            self._say(state)
            logger.info("%d steps in %.0f s", state.global_step - self.training_bar.initial, logs["train_runtime"])
        else:
            values = (f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
            logger.info("step %d: %s", state.global_step, ", ".join(values))

    def _say(self, state: Any) -> None:
        if not self.draws and state.global_step > self._said:
            logger.info("%s", str(self.training_bar))
            self._said = state.global_step
