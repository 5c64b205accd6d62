"""Stop a run on a signal, at the end of a step and with a checkpoint."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import multiprocessing.util
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunStoppedError(Exception):
    """A run ended before its last step because it was told to; the message says where it can go on."""


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after SIGTERM, SIGUSR1 or Ctrl-C.

    The step that is under way is finished. At its end all ranks hear whether one of them got a signal, so they
    stop at the same step. The exchange is between the processes' hosts; the devices are not waited for. A second
    Ctrl-C ends the process at once, even inside a collective.

    Attributes:
        stopped_by: name of the signal that ended training, None if none did.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._received = 0
        self._group: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; outside this they do what they did before."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread catch signals
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        logger.warning("%s: writing a checkpoint at the end of this step", signal.Signals(number).name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the ranks' group for the exchange."""
        if args.world_size > 1:
            timeout = datetime.timedelta(seconds=args.ddp_timeout)
            self._group = distributed.new_group(backend="gloo", timeout=timeout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the group, whose threads must not outlive the interpreter; see `llava.train.process.leave`."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training where a rank was told to stop before the last step."""
        number = self._received_anywhere()
        if number and state.global_step < state.max_steps:
            self.stopped_by = signal.Signals(number).name
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch ends early: nothing that belongs to its end is due."""
        if self.stopped_by is not None:
            control.should_save = control.should_evaluate = False

    def _received_anywhere(self) -> int:
        """Number of the signal that a rank got, 0 for none; the same on all ranks."""
        if self._group is None:
            return self._received
        number = torch.tensor(self._received)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self._group)
        return int(number)


def ignore_signals(worker: int) -> None:
    """Let a data-loading process leave signals to the training process, which ends it when it is done.

    A scheduler signals all processes of a job; without its workers the last step could not be finished.

    Args:
        worker: its number, as torch passes it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after multiprocessing's own handler, and so called before it
def _end_workers() -> None:
    """multiprocessing ends processes by SIGTERM and waits for them: for those that ignore it, without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each with a traceback
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
