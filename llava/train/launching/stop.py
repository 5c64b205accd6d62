"""Stop a run on a signal, at the end of a step and with a checkpoint."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.util
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from llava.train.launching.supervise import SIGNALS

logger = logging.getLogger(__name__)

CHECKPOINT_FOLLOWS = "writing a checkpoint at the end of this step"
RESULT_FOLLOWS = "the last step is under way or done: the run ends when its result is written"


class RunStoppedError(Exception):
    """A run ended before its last step because it was told to; the message says where it can go on."""


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after SIGTERM, SIGUSR1 or Ctrl-C.

    The step that is under way is finished. The ranks tell one another of a signal at the beginning of each step and
    hear of it at its end, so they stop at the same step: of several ranks, one step later than a single process would.
    The exchange takes the way of the gradients, and the host does not wait for it. After the last step a signal waits
    until the result is written. A second Ctrl-C ends the process at once, even inside a collective.

    Attributes:
        stopped_by: name of the signal that ended training, None if none did.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._received = 0
        self._exchange: _Exchange | None = None
        self._consequence = CHECKPOINT_FOLLOWS

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
        logger.warning("%s: %s", signal.Signals(number).name, self._consequence)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the ranks' exchange."""
        self._exchange = _Exchange(args.device) if args.world_size > 1 else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal changes nothing."""
        self._consequence = RESULT_FOLLOWS if self.stopped_by is None else "the run is stopping already"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the other ranks whether this one was told to stop."""
        if state.global_step + 1 >= state.max_steps:
            self._consequence = RESULT_FOLLOWS
        if self._exchange is not None:
            self._exchange.send(self._received)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training where a rank was told to stop before the last step."""
        number = self._received if self._exchange is None else self._exchange.receive()
        if number and state.global_step < state.max_steps:
            self.stopped_by = signal.Signals(number).name
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch ends early: nothing that belongs to its end is due."""
        if self.stopped_by is not None:
            control.should_save = control.should_evaluate = False


class _Exchange:
    """The largest of a number that each rank has, by the ranks' own process group, without waiting for the device.

    Args:
        device: that the group's collectives work on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest = torch.tensor(0)
        self._arrival: torch.Event | None = None

    def send(self, number: int) -> None:
        """Start an exchange; every rank must."""
        ranks = torch.full((), number, device=self._device)  # filled on the device: a copy would wait for it
        distributed.all_reduce(ranks, op=distributed.ReduceOp.MAX)
        self._largest = ranks.to("cpu", non_blocking=True)
        if self._device.type != "cpu":
            self._arrival = torch.Event(self._device)
            self._arrival.record()

    def receive(self) -> int:
        """The largest number of the exchange that was last started."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return int(self._largest)


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
