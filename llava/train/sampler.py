"""The order of samples: the same for the same seed and epoch, on every rank and after a resumption."""

from __future__ import annotations

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
