"""The order of samples: the same for the same seed and epoch, on every rank and after a resumption."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A random permutation that depends on seed and epoch only."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of this epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order_of_epoch(self.epoch).tolist())

    def order_of_epoch(self, epoch: int) -> Tensor:
        """Indices of all samples [length] int64 in the order of an epoch, counted from 0.

        The ranks take turns at the batches, so a step of all of them is a stretch of this order.
        """
        return self.order(torch.Generator().manual_seed(self.seed + epoch))

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of all samples [length] int64, each once."""
        return torch.randperm(self.length, generator=generator)

    def samples_of_step(self, epoch: int, place: int, size: int) -> list[int]:
        """Indices of the samples that all ranks together see in step `place` of an epoch, both counted from 0.

        Args:
            epoch: see above.
            place: see above.
            size: samples of a step.
        """
        indices: list[int] = self.order_of_epoch(epoch)[place * size : (place + 1) * size].tolist()
        return indices


class ModalityLengthSampler(EpochSampler):
    """Batches of one modality whose samples have similar lengths, as `--group_by_modality_length` asks for.

    A step that mixes modalities computes its images for few samples, and one that mixes lengths computes
    padding. Samples of one modality are shuffled, cut into steps, sorted within a step and dealt out to its batches so
    that all of them cost about the same; then the steps are shuffled. What fills no whole step comes last.

    Args:
        lengths: tokens of each sample, with a minus for those without an image.
        batch_size: samples of one batch on one device.
        batches_per_step: batches that are waited for together: devices x gradient accumulation steps.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, batches_per_step: int, seed: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        if bool((self.lengths == 0).any()):
            index = int((self.lengths == 0).nonzero()[0])
            raise ValueError(f"sample {index} has length 0: group_by_modality_length needs a length for each")
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of all samples [length] int64, each once."""
        steps, rests = [], []
        for is_modality in (self.lengths > 0, self.lengths < 0):
            indices = is_modality.nonzero().squeeze(1)
            indices = indices[torch.randperm(len(indices), generator=generator)]
            whole = len(indices) - len(indices) % self._step_size
            steps.append(self._even_steps(indices[:whole]))
            rests.append(indices[whole:])
        grouped = torch.cat(steps)
        grouped = grouped[torch.randperm(len(grouped), generator=generator)]
        rest = torch.cat(rests)
        rest = rest[self.lengths[rest].abs().argsort(descending=True, stable=True)]
        return torch.cat([grouped.flatten(), rest])

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.batches_per_step

    def _even_steps(self, indices: Tensor) -> Tensor:
        """Indices [steps * step size] as [steps, step size], a step's batches side by side, of even cost."""
        steps = indices.view(-1, self._step_size)
        by_length = self.lengths[steps].abs().argsort(dim=1, descending=True, stable=True)
        # Dealt like cards, to and fro: rows hold samples of falling length, columns become batches.
        dealt = steps.gather(1, by_length).view(-1, self.batch_size, self.batches_per_step).clone()
        dealt[:, 1::2] = dealt[:, 1::2].flip(2)
        return dealt.transpose(1, 2).reshape(-1, self._step_size)


Step = list[list[int]]
"""The micro-batches of a step: the first one of each rank, then the second one of each, and so on."""

LOOKAHEAD = 16
"""Samples a micro-batch that are looked at in search of one that still fits."""


class TokenBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank that are full of tokens, as `--tokens_per_batch` asks for: all cost about the same.

    Which samples share a micro-batch is drawn once, by the seed, so that every epoch has the same number of steps; the
    epochs shuffle the steps. Every rank has the same number of micro-batches in each step. The last step of an epoch is
    smaller, and where it has fewer samples than there are ranks, samples are seen twice.

    Args:
        lengths: tokens of each sample, visual tokens included, up to `budget`.
        budget: tokens of a micro-batch, at most.
        seed: of the shuffling.
        rank: of this process, among `ranks`.
        accumulation: micro-batches of a step on one rank.
        kinds: of the samples, one for each; those of a step are alike, but for the last steps. None: any.
        drop_last: leave out the last step where it is smaller.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        seed: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        kinds: Sequence[int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.lengths, self.budget, self.seed = list(lengths), budget, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        too_long = next((i for i, length in enumerate(self.lengths) if length > budget), None)
        if too_long is not None:
            raise ValueError(
                f"sample {too_long} has {self.lengths[too_long]} tokens, more than tokens_per_batch {budget}: raise it"
            )
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        self.full, rest = [], []
        for kind in sorted(set(kinds or [0])):
            steps, left = self._fill([i for i in order if kinds is None or kinds[i] == kind], ranks * accumulation)
            self.full += steps
            rest += left
        steps, left = self._fill(rest, ranks * accumulation)
        self.full += steps
        self.last = self._last_steps(left, ranks * accumulation, drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch's steps, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, [*self.full, *self.last])) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps_of_epoch(self.epoch):
            yield from step[self.rank :: self.ranks]

    def steps_of_epoch(self, epoch: int) -> list[Step]:
        """All steps of an epoch, counted from 0, in their order."""
        order = torch.randperm(len(self.full), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        return [self.full[i] for i in order] + self.last

    def samples_of_step(self, epoch: int, place: int, size: int) -> list[int]:
        """As `EpochSampler.samples_of_step`, whatever `size` says: steps have different numbers of samples."""
        return [index for batch in self.steps_of_epoch(epoch)[place] for index in batch]

    def describe(self) -> str:
        """How full the micro-batches are, for the log."""
        steps = [*self.full, *self.last]
        tokens = [self._tokens(batch) for step in steps for batch in step]
        samples = sum(len(batch) for step in steps for batch in step)
        return (
            f"{len(steps)} steps an epoch of {samples / max(len(steps), 1):.1f} samples on average; "
            f"{sum(tokens) / max(len(tokens), 1) / self.budget:.1%} of a micro-batch's {self.budget} tokens are used"
        )

    def _tokens(self, batch: list[int]) -> int:
        return sum(self.lengths[index] for index in batch)

    def _fill(self, indices: list[int], size: int) -> tuple[list[Step], list[int]]:
        """Steps of `size` full micro-batches, and the indices that fill no whole step.

        The next sample goes into the micro-batch that has the fewest tokens. One that does not fit there fits nowhere,
        and waits for the next step, while later ones are tried.
        """
        steps: list[Step] = []
        queue = deque(indices)
        while True:
            batches, waiting = self._fill_step(queue, size)
            queue.extendleft(reversed(waiting))
            if len(waiting) < LOOKAHEAD * size:  # the samples came to an end before the step was full
                return steps, [index for batch in batches for index in batch] + list(queue)
            steps.append(self._even(batches))

    def _fill_step(self, queue: deque[int], size: int) -> tuple[Step, list[int]]:
        """The micro-batches of a step, taken off a queue, and the samples of it that did not fit."""
        batches: Step = [[] for _ in range(size)]
        heap = [(0, number) for number in range(size)]
        waiting: list[int] = []
        while queue and len(waiting) < LOOKAHEAD * size:
            index = queue.popleft()
            tokens, number = heap[0]
            if tokens + self.lengths[index] > self.budget:
                waiting.append(index)
                continue
            heapq.heapreplace(heap, (tokens + self.lengths[index], number))
            batches[number].append(index)
        return batches, waiting

    def _last_steps(self, indices: list[int], most: int, drop_last: bool) -> list[Step]:
        """What is left, on as few micro-batches a rank as hold it, `most` in a step but for the last."""
        longest_first = sorted(indices, key=lambda index: -self.lengths[index])
        size = self.ranks if indices else 0
        batches, waiting = self._fill_step(deque(longest_first), size)
        while waiting:
            size += self.ranks
            batches, waiting = self._fill_step(deque(longest_first), size)
        batches = self._even(batches)
        steps = [batches[start : start + most] for start in range(0, size, most)]
        empty = [batch for batch in batches if not batch]
        if drop_last and (size % most or empty):
            return steps[:-1]
        seen = [index for step in [*self.full, *steps] for batch in step for index in batch]
        for number, batch in enumerate(empty):
            batch.append(seen[number % len(seen)])
        return steps

    def _even(self, batches: Step) -> Step:
        """The fullest first, so that what the ranks run side by side is alike."""
        return sorted(batches, key=self._tokens, reverse=True)
