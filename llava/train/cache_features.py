"""`llava cache-features`: run the frozen vision tower once over all images of a run's data, and keep what it makes.

Each process encodes its share of the pictures that the cache lacks, so a run that was killed goes on, on any number of
processes. With `num_gpus` or `deepspeed` they are started as those of a training are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    # In place of this folder, whose modules are not meant to be imported by their bare names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava.data.dataset import LazySupervisedDataset
from llava.data.feature_cache import FeatureCache, Manifest, ShardWriter, features_bytes
from llava.data.stored_features import StoredFeatures
from llava.files import check_writable, remove_leftovers
from llava.lock import lock
from llava.messages import set_up_messages
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.visual_encoding import store_features
from llava.model.weights import load_into, tower_weights
from llava.train.data import load_dataset
from llava.train.feature_key import check_fixed, feature_key, inner_model, refuse_clips
from llava.train.modeling import compute_dtype, load_tokenizer, loading_dtype, read_config
from llava.train.pictures import Picture, Pictures, list_pictures
from llava.train.preflight.models import build_without_weights
from llava.train.settings.arguments import runs_on_cpu
from llava.train.settings.parsing import Arguments, check_args

GIB = 2**30
PATIENCE = timedelta(days=7)
"""How long processes wait for one another at the end."""
logger = logging.getLogger("llava.train.cache_features")  # also where a launcher runs this file


def main(argv: list[str]) -> None:
    """Cache the features of the run that the flags describe.

    Args:
        argv: its flags, as for training.

    Raises:
        ValueError: what a training would refuse; features that may not be stored; a cache of another run's; or too
            little disk.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_up_messages(logging.INFO if rank == 0 else logging.WARNING)
    arguments = check_args(argv)
    if not arguments.data.feature_cache:
        raise ValueError("where to? Name a folder for the features with feature_cache=FOLDER (--feature_cache)")
    if world_size > 1:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    _Run(arguments, rank, world_size).build()


class Encoder:
    """The vision tower and the method after it, as the run's model has them, without a language model.

    Args:
        arguments: of the run, with settings filled in by `read_config`.
        config: from `read_config`.

    Raises:
        ValueError: the features may not be stored, or the tower's weights do not fit.
    """

    def __init__(self, arguments: Arguments, config: Any) -> None:
        self.model = build_without_weights(arguments, config).eval()  # in training a tower for frames would run too
        check_fixed(self.model)
        training, self.inner = arguments.training, inner_model(self.model)
        here = "cpu" if runs_on_cpu(training) else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = torch.device(here)
        self._autocast = (
            compute_dtype(training) if (training.bf16 or training.fp16) and not training.deepspeed else None
        )
        tower = build_vision_tower(self.inner.config)
        names = [name for name, _ in tower.vision_tower.named_parameters()]
        place = (str(arguments.model.model_name_or_path), str(arguments.model.vision_tower))
        load_into(tower.vision_tower, tower_weights(*place, names, training.cache_dir), " or ".join(place))
        dtype = compute_dtype(training) if training.deepspeed else loading_dtype(arguments)
        self.inner.vision_tower = tower.requires_grad_(False).to(self.device, dtype).eval()

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor]) -> list[StoredFeatures]:
        """What the projector will read of pictures [3, H, W] or [tiles, 3, H, W]: one for each, on the host."""
        tiles = [one.reshape(-1, *one.shape[-3:]) for one in pixels]
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            read = self.inner.read_tiles(torch.cat(tiles).to(self.device), None, self.inner.reducers())
        return store_features(read, [len(one) for one in tiles]).split()


class _Run:
    """What one process does."""

    def __init__(self, arguments: Arguments, rank: int, world_size: int) -> None:
        self.arguments, self.rank, self.world_size = arguments, rank, world_size
        self.folder = Path(str(arguments.data.feature_cache))
        check_writable(self.folder, "--feature_cache")
        config, tokenizer = read_config(arguments), load_tokenizer(arguments)
        self.encoder = Encoder(arguments, config)
        dataset = load_dataset(arguments, config, tokenizer)
        assert isinstance(dataset, LazySupervisedDataset)  # --streaming was refused
        refuse_clips(dataset)
        self.dataset = dataset
        self.key = feature_key(self.encoder.model, arguments, self.dataset.maker.image_processor)
        self.pictures = list_pictures(self.dataset)
        if not self.pictures:
            raise ValueError("the data has no images: leave out --feature_cache")

    def build(self) -> None:
        """Encode what the cache lacks."""
        with self._locked():
            problem = [self._prepared() if self.rank == 0 else None]
            if self.world_size > 1:
                distributed.broadcast_object_list(problem)
            if problem[0] is not None:
                raise ValueError(problem[0])
            cache = FeatureCache(self.folder)
            lacking = self._lacking(cache)
            self._wait()  # all have looked before one writes
            self._encode_share(cache, lacking[self.rank :: self.world_size])
            self._wait()
            if self.rank == 0:
                cache = FeatureCache(self.folder)
                logger.info("%s holds %d pictures in %.2f GiB", self.folder, len(cache), cache.total_bytes / GIB)

    def _wait(self) -> None:
        if self.world_size > 1:
            distributed.barrier()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self.rank > 0:
            yield
            return
        with lock(self.folder / ".lock", f"--feature_cache {self.folder}"):
            remove_leftovers(self.folder)
            yield

    def _lacking(self, cache: FeatureCache | None) -> list[Picture]:
        return [one for one in self.pictures if cache is None or not cache.holds(one.key)]

    def _prepared(self) -> str | None:
        """Make the cache ready, and say what keeps it from being filled; None: nothing."""
        try:
            manifest = Manifest.read(self.folder)
            if manifest is not None:
                manifest.check(self.key, self.folder)
            elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise ValueError(f"--feature_cache {self.folder} holds something else: name a new or empty folder")
            self._measure(None if manifest is None else FeatureCache(self.folder))
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def _measure(self, cache: FeatureCache | None) -> None:
        """Encode some pictures, to state what all will take, and to write the manifest.

        Raises:
            ValueError: there is too little disk, or a picture's pixels differ from one time to the next.
        """
        lacking = self._lacking(cache)
        if not lacking:
            logger.info("%s holds all %d pictures of the data already", self.folder, len(self.pictures))
            return
        some = Pictures(self.dataset, lacking).some()
        parts: list[StoredFeatures] = []
        for index in range(len(some)):
            one = some[index]
            if one.pixels is None:
                continue
            if not parts and not torch.equal(one.pixels, cast(Tensor, some[index].pixels)):
                raise ValueError(
                    "--feature_cache: the image processor makes other pixels of a picture each time (augmentation), so "
                    "its features can't be stored: leave it out"
                )
            parts += self.encoder.encode([one.pixels])
        if cache is None and not parts:
            raise ValueError(f"none of {len(some)} pictures that were looked at can be read: see llava doctor")
        if parts:
            manifest = Manifest(self.key, tuple(parts[0].tokens.shape[1:]), parts[0].grid)
            check_disk(self.folder, len(lacking), parts, manifest.dtype)
            if cache is None:
                manifest.write(self.folder)

    def _encode_share(self, cache: FeatureCache, share: Sequence[Picture]) -> None:
        training, writer = self.arguments.training, ShardWriter(self.folder, cache.empty())
        loader: DataLoader[Any] = DataLoader(
            Pictures(self.dataset, share),
            batch_size=training.per_device_train_batch_size,
            collate_fn=list,
            num_workers=training.dataloader_num_workers,
        )
        start, written = time.monotonic(), 0
        with tqdm(total=len(share), desc="caching features", disable=None if self.rank == 0 else True) as progress:
            for batch in loader:
                good = [one for one in batch if one.pixels is not None]
                features = self.encoder.encode([one.pixels for one in good]) if good else []
                for one in batch:
                    if one.pixels is None:
                        writer.add_unreadable(one.picture.key, one.problem)
                new = sum(writer.add(one.picture.key, one.size, f) for one, f in zip(good, features, strict=True))
                progress.update(len(batch))
                written += new
                if new:
                    logger.info("%d of %d pictures are written", written, len(share))
        written += writer.flush()
        if written:
            seconds = time.monotonic() - start
            logger.info("%d pictures in %.0f s, %.1f a second and process", written, seconds, written / seconds)


def check_disk(folder: Path, count: int, parts: Sequence[StoredFeatures], dtype: torch.dtype) -> None:
    """State what so many pictures will take, and refuse what the disk does not have.

    Args:
        folder: of the cache.
        count: pictures to come.
        parts: of some of them.
        dtype: that they are stored in.

    Raises:
        ValueError: there is too little.
    """
    each = sum(features_bytes(part, dtype) for part in parts) / len(parts)
    need, free = count * each, shutil.disk_usage(folder).free
    text = (
        f"{count} pictures will take about {need / GIB:.2f} GiB ({each / 1024:.1f} KiB each, by {len(parts)} of them), "
        f"{free / GIB:.2f} GiB are free in {folder}"
    )
    if need > free:
        raise ValueError(f"--feature_cache: {text}: name another disk, or a method that leaves fewer tokens")
    logger.info("%s", text)


if __name__ == "__main__":
    from llava.train.launching.process import choose_accelerator, leave, run_and_report

    choose_accelerator()
    leave(run_and_report(main, sys.argv[1:]))
