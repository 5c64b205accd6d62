"""Features of pictures on disk: a folder of shards, what they were made with, and how a picture's are found.

A shard is a safetensors file, written under another name and renamed, so each is whole. A picture is known by its path,
size and time of change (a URL by its name, what a data file holds itself by its content), so one that was changed is
not found. Any number of processes may write shards of their own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava.data.media.images import check_image_exists
from llava.data.sources import is_url
from llava.data.stored_features import StoredFeatures, join_features
from llava.files import atomic_folder

MANIFEST = "feature_cache.json"
SHARDS = "features-*.safetensors"
SHARD_BYTES = 1 << 29
"""Size from which a shard is written: what a process that is killed loses, and holds in memory, twice."""
KEY_BYTES = 16
_OPEN_SHARDS = 64


class NotCachedError(ValueError):
    """A picture of the data is not in the cache."""


class UnreadablePictureError(ValueError):
    """A picture could not be read when the cache was made; the message says why."""


def picture_key(picture: str | bytes) -> bytes:
    """What a picture is known by, 16 bytes.

    Args:
        picture: its path or URL, otherwise its content.

    Raises:
        ValueError: there is no such file.
    """
    if isinstance(picture, bytes):
        return hashlib.blake2b(picture, digest_size=KEY_BYTES).digest()
    words = [picture]
    if not is_url(picture):
        try:
            status = Path(picture).stat()
        except (OSError, ValueError):
            check_image_exists(picture)  # says what is wrong with it
            raise
        # Whole seconds: file systems and copies keep more or fewer digits.
        words = [os.path.abspath(picture), str(status.st_size), str(int(status.st_mtime))]  # noqa: PTH100 (links stay)
    return hashlib.blake2b("\0".join(words).encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Manifest:
    """What a cache says of itself.

    Attributes:
        made_with: all that its features depend on besides the pictures, by name.
        shape: of a token, (C,) or (B, C).
        grid: see `StoredFeatures`.
    """

    made_with: dict[str, Any]
    shape: tuple[int, ...]
    grid: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features."""
        dtype: torch.dtype = getattr(torch, str(self.made_with["feature_cache_dtype"]))
        return dtype

    def write(self, folder: Path) -> None:
        """Write it to the folder of a cache."""
        content = {"made_with": self.made_with, "shape": self.shape, "grid": self.grid}
        with atomic_folder(folder) as staging:
            (staging / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder; None where there is none.

        Raises:
            ValueError: the file is none.
        """
        file = folder / MANIFEST
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            grid = content["grid"]
            return cls(content["made_with"], tuple(content["shape"]), None if grid is None else (grid[0], grid[1]))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} can't be read: remove {folder}, and make the cache again") from error

    def check(self, wanted: Mapping[str, Any], folder: Path) -> None:
        """Refuse a run that the cache does not fit.

        Args:
            wanted: what the run's features depend on.
            folder: of the cache, for the message.

        Raises:
            ValueError: names what differs.
        """
        kept, plain = self.made_with, json.loads(json.dumps(dict(wanted)))
        names = [name for name in {**kept, **plain} if kept.get(name) != plain.get(name)]
        if names:
            lines = [f"  {name}: {json.dumps(kept.get(name))} -> {json.dumps(plain.get(name))}" for name in names]
            raise ValueError(
                f"--feature_cache {folder} was made for a run with other features:\n"
                + "\n".join(lines)
                + "\ngive this run a cache of its own: llava cache-features CONFIG feature_cache=ANOTHER_FOLDER"
            )


# Reading ---------------------------------------------------------------------------------------------------------


class FeatureCache:
    """The features of a folder, found by picture and read when they are asked for.

    Args:
        folder: with a manifest.

    Raises:
        ValueError: there is no cache, or a file of it is torn.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise ValueError(
                f"--feature_cache {folder} holds no features yet: make them with llava cache-features and the same "
                "CONFIG.yaml and settings"
            )
        self.manifest = manifest
        self._shards = [_ShardIndex.read(path) for path in sorted(self.folder.glob(SHARDS))]
        counts = [len(shard.tiles) for shard in self._shards]
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(shard.keys for shard in self._shards)])
        self._order = keys.argsort(kind="stable")
        self._keys = keys[self._order]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def total_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.path.stat().st_size for shard in self._shards)

    def holds(self, key: bytes) -> bool:
        """Whether there is an entry for a picture."""
        return self._place(key) is not None

    def _place(self, key: bytes) -> int | None:
        place = int(np.searchsorted(self._keys, np.array(key, dtype=self._keys.dtype)))
        # numpy leaves zeros at the end of a text out.
        found = place < len(self._keys) and self._keys[place].ljust(KEY_BYTES, b"\0") == key
        return int(self._order[place]) if found else None

    def empty(self) -> StoredFeatures:
        """No picture, in the form of this cache's features."""
        tokens = torch.empty(0, *self.manifest.shape, dtype=self.manifest.dtype)
        return StoredFeatures(tokens, [], [], grid=self.manifest.grid)

    def check(self, picture: str | bytes) -> None:
        """Raise what `read` would raise, without reading."""
        self._find(picture)

    def _find(self, picture: str | bytes) -> tuple[_ShardIndex, int]:
        place = self._place(picture_key(picture))
        if place is None:
            name = f"{picture!r:.300}" if isinstance(picture, str) else "that the data file holds"
            raise NotCachedError(
                f"image {name} is not in --feature_cache {self.folder}, or has changed since: run llava "
                "cache-features again, which adds what is missing"
            )
        number = int(np.searchsorted(self._ends, place, side="right"))
        shard = self._shards[number]
        index = place - int(self._ends[number]) + len(shard.tiles)
        if index in shard.problems:
            raise UnreadablePictureError(shard.problems[index])
        return shard, index

    def read(self, picture: str | bytes) -> tuple[StoredFeatures, tuple[int, int]]:
        """Features of a picture, and its (width, height) in pixels.

        Args:
            picture: as for `picture_key`.

        Raises:
            NotCachedError: there are none.
            UnreadablePictureError: it could not be read when they were made.
            ValueError: the picture's file is missing.
        """
        shard, index = self._find(picture)
        first = int(shard.first_tile[index])
        tiles = slice(first, first + int(shard.tiles[index]))
        begin, end = int(shard.first_token[tiles.start]), int(shard.first_token[tiles.stop])
        file = _open_shard(str(shard.path))
        source = file.get_slice("source")[begin:end].long() if shard.has_source else None
        features = StoredFeatures(
            tokens=file.get_slice("tokens")[begin:end],
            lengths=np.diff(shard.first_token[tiles.start : tiles.stop + 1]).tolist(),
            tiles=[int(shard.tiles[index])],
            source=source,
            grid=self.manifest.grid,
        )
        width, height = shard.sizes[index].tolist()
        return features, (width, height)


@dataclass(frozen=True)
class _ShardIndex:
    """Of the n pictures of a shard all but their features; of tile and token also the place after the last."""

    path: Path
    keys: np.ndarray  # [n] texts of 16 bytes
    tiles: np.ndarray  # [n]
    sizes: np.ndarray  # [n, 2] width and height
    first_tile: np.ndarray  # [n + 1]
    first_token: np.ndarray  # [tiles + 1]
    has_source: bool
    problems: dict[int, str]

    @classmethod
    def read(cls, path: Path) -> _ShardIndex:
        try:
            with safe_open(path, framework="pt") as file:
                tiles, lengths, sizes, keys = (
                    file.get_tensor(n).numpy() for n in ("tiles", "lengths", "sizes", "keys")
                )
                has_source = "source" in file.keys()  # noqa: SIM118
                problems = json.loads(file.metadata()["problems"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is torn, or no shard of a feature cache ({error}): remove it and run llava cache-features"
            ) from error
        return cls(
            path=path,
            keys=np.ascontiguousarray(keys).view(f"S{KEY_BYTES}")[:, 0],
            tiles=tiles,
            sizes=sizes,
            first_tile=np.concatenate([[0], np.cumsum(tiles, dtype=np.int64)]),
            first_token=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            has_source=has_source,
            problems={int(index): reason for index, reason in problems.items()},
        )


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: str) -> Any:
    return safe_open(path, framework="pt")


# Writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Gathers features and writes them, a shard at a time.

    Args:
        folder: of the cache.
        empty: `FeatureCache.empty`, which says in which form.
        shard_bytes: size from which a shard is written.
    """

    def __init__(self, folder: Path, empty: StoredFeatures, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._empty, self._shard_bytes = folder, empty, shard_bytes
        self._begin()

    def _begin(self) -> None:
        self._keys: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []
        self._parts = [self._empty]
        self._tiles: list[int] = []
        self._problems: dict[int, str] = {}
        self._bytes = 0

    def add(self, key: bytes, size: tuple[int, int], features: StoredFeatures) -> int:
        """Note the features of one picture of (width, height) pixels; they are on the host.

        Returns:
            How many pictures were written, where a shard was full.
        """
        if features.tokens.shape[1:] != self._empty.tokens.shape[1:]:
            raise ValueError(f"tokens of shape {tuple(features.tokens.shape)} in a cache of {self._empty.tokens.shape}")
        self._note(key, size, sum(features.tiles))
        self._parts.append(features)
        self._bytes += features_bytes(features, self._empty.tokens.dtype)
        return self.flush() if self._bytes >= self._shard_bytes else 0

    def add_unreadable(self, key: bytes, reason: str) -> None:
        """Note that a picture cannot be read."""
        self._problems[len(self._keys)] = reason
        self._note(key, (0, 0), 0)

    def _note(self, key: bytes, size: tuple[int, int], tiles: int) -> None:
        self._keys.append(key)
        self._sizes.append(size)
        self._tiles.append(tiles)

    def flush(self) -> int:
        """Write what was gathered.

        Returns:
            How many pictures that were.

        Raises:
            OSError: it can't be written.
        """
        count = len(self._keys)
        if not count:
            return 0
        all_parts = join_features(self._parts)
        tensors = {
            "tokens": all_parts.tokens.to(self._empty.tokens.dtype).contiguous(),
            "lengths": torch.tensor(all_parts.lengths, dtype=torch.int32),
            "tiles": torch.tensor(self._tiles, dtype=torch.int32),
            "sizes": torch.tensor(self._sizes, dtype=torch.int32),
            "keys": torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(count, KEY_BYTES),
        }
        if all_parts.source is not None:
            tensors["source"] = all_parts.source.to(torch.int32)
        self._write(tensors)
        self._begin()
        return count

    def _write(self, tensors: dict[str, Tensor]) -> None:
        name = SHARDS.replace("*", uuid.uuid4().hex[:12])
        with atomic_folder(self._folder) as staging:
            try:
                save_file(tensors, staging / name, metadata={"problems": json.dumps(self._problems)})
            except SafetensorError as error:
                raise OSError(errno.EIO, f"can't be written: {error}", str(self._folder / name)) from error
            with (staging / name).open("rb") as file:
                os.fsync(file.fileno())  # without it a crashed machine can leave the new name with no content


def features_bytes(features: StoredFeatures, dtype: torch.dtype) -> int:
    """What features take on disk, in this type; what stands beside the tokens is counted where it grows with them."""
    return features.tokens.numel() * dtype.itemsize + (0 if features.source is None else 4 * len(features.source))
