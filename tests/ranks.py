"""Training runs in processes that start at once, for tests that kill them or need two ranks.

A server process imports what training needs, once (`tests.preload`); each rank is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.train.launching.process import remove_shared_buffer
from tests.tiny_world import ROOT

ZERO = {"bf16": True, "dataloader_num_workers": 0}


def zero_flags(stage: int) -> dict[str, Any]:
    """Flags of a run with this ZeRO stage; stage 0 is without DeepSpeed."""
    return {**ZERO, "deepspeed": ROOT / f"scripts/zero{stage}.json"} if stage else {}


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Ranks:
    """The processes of one run.

    Args:
        flags: of the run.
        ranks: how many train together.
        log: file that gets what they print.
        before: called in each process before it trains, with its rank and `arguments`; may set traps.
    """

    def __init__(
        self,
        flags: list[str],
        ranks: int = 1,
        *,
        log: Path,
        before: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by the server when it imports deepspeed
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.extension", "tests.preload"])
        self.log = log
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.address, self.port = "127.0.0.1", str(free_port())
        place |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        self.processes = []
        for rank in range(ranks):
            environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(flags, environment, str(log), before, arguments))
            process.start()
            self.processes.append(process)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Wait until a line of the log has `text`."""
        end = time.monotonic() + timeout
        while text not in self.printed():
            if time.monotonic() > end or not any(process.is_alive() for process in self.processes):
                self.kill()
                raise TimeoutError(f"{text!r} was not printed:\n{self.printed()[-3000:]}")
            time.sleep(0.02)

    def printed(self) -> str:
        """What the ranks have printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """End all ranks with SIGKILL."""
        for rank, process in enumerate(self.processes):
            process.kill()
            remove_shared_buffer(rank, self.address, self.port)

    def join(self, timeout: float = 300) -> list[int]:
        """Exit codes by rank; of one that a signal ended, minus the signal. One that fails ends the others."""
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.processes):
            codes = [process.exitcode for process in self.processes]
            if any(code not in (None, 0) for code in codes):
                self._leave_time(0 if min(code or 0 for code in codes) < 0 else 5)
                self.kill()
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.printed()[-3000:]}")
            time.sleep(0.02)
        return [int(process.exitcode or 0) for process in self.processes]

    def _leave_time(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))


def train_in_ranks(flags: list[str], ranks: int, log: Path) -> None:
    """Train, and fail with what was printed unless all ranks end well."""
    run = Ranks(flags, ranks, log=log)
    codes = run.join()
    assert codes == [0] * ranks, f"exit codes {codes}:\n{run.printed()[-4000:]}"


def redirect_output(log: str) -> None:
    """Append what this process prints to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def kill_in_step(rank: int, victim: int, number: int) -> None:
    """Trap: the rank `victim` gets SIGKILL in the forward pass of its micro-batch `number`, counted from 1."""
    from llava.train.trainer import LLaVATrainer

    whole, calls = LLaVATrainer.compute_loss, []

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if rank == victim and len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args, **kwargs)

    LLaVATrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def kill_while_writing(rank: int, victim: int, number: int) -> None:
    """Trap: the rank `victim` gets SIGKILL when it has written most of checkpoint-`number`."""
    from llava.train.trainer import LLaVATrainer

    whole = LLaVATrainer._save_rng_state

    def save(self: Any, folder: str) -> None:
        if rank == victim and folder.endswith(f"checkpoint-{number}"):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, folder)

    LLaVATrainer._save_rng_state = save  # type: ignore[method-assign]


def slow_steps(rank: int, seconds: float, signal_all: bool = False) -> None:
    """Trap: each micro-batch takes longer and is announced; in the third, SIGTERM to all processes of this run."""
    from llava.train.trainer import LLaVATrainer

    whole, calls = LLaVATrainer.compute_loss, []

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        print(f"rank {rank}: step {self.state.global_step + 1} begins", file=sys.stderr, flush=True)
        if signal_all and len(calls) == 3:
            processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
            # By another process: a worker takes its parent's SIGTERM for the orderly end.
            subprocess.run(["kill", *(str(process.pid) for process in processes)], check=True)
        time.sleep(seconds)
        return whole(self, *args, **kwargs)

    LLaVATrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def _rank(
    flags: list[str],
    environment: dict[str, str],
    log: str,
    before: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> None:
    redirect_output(log)
    multiprocessing.set_start_method("fork", force=True)  # for data loading, as where a launcher starts the ranks
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    from llava.train.launching.process import leave, run_and_report
    from llava.train.train import main

    if before is not None:
        before(int(environment["RANK"]), *arguments)
    code = run_and_report(main, flags)
    sys.stdout.flush()
    leave(code)
