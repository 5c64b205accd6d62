"""What a line of a run's log says beside loss, gradient norm and learning rate."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_pt_utils import nested_gather

from llava.train.logs.batch_meter import BatchMeter, Stopwatch, Totals, describe, peak_memory
from llava.train.logs.divergence import LossWatch
from llava.train.logs.flops import FlopsModel, utilization


class RunMeter:
    """Throughput, image tokens, padding, memory and utilization between two lines of log.

    Nothing waits for the device between the lines; at a line, where the loss is read anyway, the ranks' sums are
    gathered once.

    Attributes:
        watch: seconds since the last line.
        batches: sums up what the batches since the last line held.
        losses: counts steps in a row whose loss is not finite.
        nonfinite_steps: what it had counted at the last reading, the most of all processes.

    Args:
        model: LLaVA's model or PEFT's wrapper of it, with requires_grad set as it is trained.
        args: of the run.
    """

    def __init__(self, model: Any, args: Any) -> None:
        llava = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.watch = Stopwatch()
        self.losses = LossWatch()
        self.nonfinite_steps = 0
        self._args = args
        self.batches, self._flops = BatchMeter(), FlopsModel(llava)
        self._has_decoder_reducer = llava.get_model().decoder_reducer is not None

    def read(self) -> dict[str, float]:
        """Entries of all processes together since the last reading; every rank must call it."""
        device = self._args.device
        memory = torch.tensor([peak_memory()], dtype=torch.float64, device=device)
        own = torch.cat([self.batches.read(device), memory, self.losses.read(device)])
        ranks = nested_gather(own.unsqueeze(0), self._args.parallel_mode).cpu()
        seconds = self.watch.lap()
        totals = Totals(*ranks[:, :-2].sum(dim=0).tolist())
        self.nonfinite_steps = int(ranks[:, -1].max())
        if not totals.tokens:
            return {}
        entries = describe(totals, seconds, self._has_decoder_reducer)
        entries["peak_memory_gb"] = round(float(ranks[:, -2].max()), 3)
        computes_16_bit = self._args.bf16 or self._args.fp16
        mfu = utilization(self._flops.of(totals), seconds, len(ranks), computes_16_bit)
        return entries if mfu is None else {**entries, "mfu": mfu}
