"""Training data that is read while it is trained on, for what does not fit on a disk.

The stream never ends: each source starts again where it is through, so that no rank waits for another, and `max_steps`
says when to stop. Rows are dealt to processes and workers by `datasets`: whole files where their number allows it,
otherwise every n-th row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from llava.data.items import ItemMaker
from llava.data.records import DataError, count_parquet_rows, read_records, size_of
from llava.data.sources import DataPath, DataSource, parse_data_path
from llava.data.table import stream_table

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000
"""Rows of a source among which the next is drawn."""

_SIZE_SAMPLE = 100
"""Samples at the beginning of a file that its number of samples is estimated from."""


class StreamingSupervisedDataset(IterableDataset[dict[str, Any]]):
    """The items of `LazySupervisedDataset`, without a length and in an order that seed and processes determine.

    A source is drawn from in proportion to its weight times its number of samples, which is counted for Parquet files
    and estimated for others.

    Args:
        data_path: see `llava.data.sources.parse_data_path`.
        maker: makes the items.
        rank: of this process.
        world_size: number of processes.
        seed: of the order.
        shuffle_buffer: rows among which the next is drawn, in each worker and for each source; 1 keeps the order.

    Raises:
        ValueError: see `parse_data_path`; image options that do not fit each other. While iterating: what
            `read_records` raises, a bad sample where they stop the run, and a source with fewer samples than there are
            workers in all.
    """

    def __init__(
        self,
        data_path: DataPath,
        maker: ItemMaker,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        self.sources = parse_data_path(data_path)
        self.maker = maker
        if maker.image_processor is not None:
            maker.check_image_options()
        self._files = [source.files() for source in self.sources]
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle_buffer = seed, shuffle_buffer
        self._batches_done, self._batch_size = 0, 1
        sizes = [sum(map(estimate_samples, files)) for files in self._files]
        drawn = np.array([source.weight for source in self.sources]) * sizes
        self._probabilities = drawn / drawn.sum()
        logger.info("streaming about %d samples of %d sources", sum(sizes), len(sizes))

    def resume(self, batches: int, batch_size: int) -> None:
        """Begin after what a run has seen already; its rows are read again, but no image is.

        Args:
            batches: that each process has taken.
            batch_size: samples of a batch of one process.
        """
        self._batches_done, self._batch_size = batches, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn, beginning with the first: that takes the place of the one whose turn it
        # was when the run was interrupted.
        number = (number + self._batches_done) % workers
        done = len(range(number, self._batches_done, workers)) * self._batch_size
        for row, source in islice(self._rows(number, workers), done, None):
            yield self.maker.item(row, source.image_folder)

    def _rows(self, worker: int, workers: int) -> Iterator[tuple[dict[str, Any], DataSource]]:
        """Rows of all sources for one worker, without end."""
        part, parts = self._rank * workers + worker, self._world_size * workers
        streams = [self._endless(files, part, parts) for files in self._files]
        chance = np.random.default_rng([self._seed, part])
        while True:
            index = int(chance.choice(len(streams), p=self._probabilities))
            yield next(streams[index]), self.sources[index]

    def _endless(self, files: Sequence[str], part: int, parts: int) -> Iterator[dict[str, Any]]:
        """One of `parts` shares of the rows of some files, again and again, each time in another order."""
        from datasets.distributed import split_dataset_by_node

        table = stream_table(list(files), self.maker.version)
        if self._shuffle_buffer > 1:
            table = table.shuffle(seed=self._seed, buffer_size=self._shuffle_buffer)
        table = split_dataset_by_node(table, part, parts)
        for epoch in count():
            table.set_epoch(epoch)
            row = None
            # By batches, because `datasets` would deal single rows to this loader's workers once more.
            for batch in table.iter(batch_size=1):
                row = {name: values[0] for name, values in batch.items()}
                yield row
            if row is None:
                raise DataError(
                    f"{', '.join(files)}: fewer samples than processes x workers ({parts}); do without --streaming"
                )


def estimate_samples(file: str) -> float:
    """Number of samples of a file: counted for Parquet, otherwise its size over that of its first samples.

    Raises:
        DataError: it cannot be read, or has none.
    """
    if file.endswith(".parquet"):
        count = float(count_parquet_rows(file))
    else:
        first = [len(json.dumps(sample, default=str)) for sample in islice(read_records(file), _SIZE_SAMPLE)]
        count = max(1.0, size_of(file) * len(first) / sum(first)) if first else 0.0
    if not count:
        raise DataError(f"no samples in data file {file!r}; fill it, or leave it out of data_path")
    return count
