"""The golden cases as the repository keeps them: each distinct tensor, picture and file once, bit for bit.

`python -m tests.golden.pack ../shared` packs both sets anew: `golden` whole, which `unpack` lays out again, and of
`golden-more` the cases that `SELECTION` names, into `more/`, where `read_packed` reads them.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
MORE = HERE / "more"
FILES, PICTURES, POOL, INDEX = "files", "pixels", "tensors.safetensors", "index.json"
SELECTION = (
    *("tower_*", "*_weights", "*_block", "*_step", "*_random", "*_wide", "*_train"),
    *("fastervlm_*_batch", "holov_*_batch", "vispruner_*_batch", "cdpruner_32_batch", "visionzip_54_10_batch"),
    *("tome_lightcompress_r22_batch", "tome_lightcompress_T64_1", "tome_lightcompress_start30_step-1_1"),
    *("tome_paper_r22_0", "tome_paper_T64_2", "visionzip_54_10_0", "visionzip_12_4_2"),
    *("fastervlm_64_1", "vispruner_64_0.75_2", "holov_64_1", "divprune_56_0", "divprune_16_1"),
    *("cdpruner_16_1", "cdpruner_48_2", "cdpruner_32_0", "cdpruner_32_long*", "mmtok_16_1", "mmtok_64_2"),
    *("vscan_96_32_0", "vscan_160_96_32_2", "sparsevlm_96_0", "sparsevlm_192_1", "sparsevlm_plus_96_0"),
    *("sparsevlm_plus_64_2", "dart_64_1", "dart_norm_128_2", "dart_ratio*", "fastv_2_0.889_0", "fastv_3_*"),
    *("m3_1_1", "m3_9_2", "m3_36_0", "mqt_2_2", "mqt_16_0", "mqt_64_1", "tokenpacker_2_0", "tokenpacker_4_0"),
)
"""Names of cases: of each family the cheap ones that differ in what they ask of the method."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.bin` file."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def pack(source: Path, target: Path = HERE, names: Sequence[str] = ("*",)) -> None:
    """Write what `unpack` reads, in place of what is there: the files whose stems match one of the names."""
    for folder in (FILES, PICTURES):
        shutil.rmtree(target / folder, ignore_errors=True)
    pool: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {"files": {}, "tensors": {}}
    seen: dict[bytes, str] = {}
    for path in sorted(file for file in source.rglob("*") if file.is_file() and file != source / "README.md"):
        if not any(fnmatch.fnmatch(path.stem, name) for name in names):
            continue
        name = path.relative_to(source).as_posix()
        same = seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), name)
        if path.suffix not in (".bin", ".safetensors"):
            index["files"][name] = same
            if same == name:
                (target / FILES / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / FILES / name)
        elif same == name:
            tensors = read_tensors(path)
            index["tensors"][name] = {key: _pack(tensor, path, pool, target) for key, tensor in tensors.items()}
        else:
            index["tensors"][name] = same
    target.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(pool.items())), target / POOL)
    (target / INDEX).write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")


def unpack(target: Path, source: Path = HERE) -> Path:
    """Lay the cases out in `target`, in the folders that `README.md` describes."""
    index = read_index(source)
    for name, stored in index["files"].items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / FILES / stored, target / name)
    for name, entries in index["tensors"].items():
        if isinstance(entries, str):
            shutil.copyfile(target / entries, target / name)
            continue
        tensors = read_packed(name, source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / name) if name.endswith(".safetensors") else torch.save(tensors, target / name)
    return target


@functools.cache
def read_index(source: Path) -> dict[str, dict[str, Any]]:
    """What each packed file holds: `files`, kept as they are, and `tensors`."""
    return json.loads((source / INDEX).read_text(encoding="utf-8"))


def read_packed(name: str, source: Path) -> dict[str, Tensor]:
    """Tensors of a packed file."""
    entries = read_index(source)["tensors"][name]
    if isinstance(entries, str):
        return read_packed(entries, source)
    pool = _read_pool(source)
    return {key: _unpack(entry, pool, source) for key, entry in entries.items()}


@functools.cache
def _read_pool(source: Path) -> dict[str, Tensor]:
    return load_file(source / POOL)


def _pack(tensor: Tensor, path: Path, pool: dict[str, Tensor], target: Path) -> Any:
    """What the index says of a tensor: keys in the pool, of its rows where a batch repeats single cases."""
    if tensor.ndim == 4 and path.stem.startswith(PICTURES):
        return _pack_pixels(tensor, path.stem, pool, target)
    rows = tensor.split(1) if tensor.ndim == 3 and path.suffix == ".safetensors" else (tensor,)
    return [_keep(row, pool) for row in rows]


def _pack_pixels(pixels: Tensor, name: str, pool: dict[str, Tensor], target: Path) -> dict[str, Any]:
    """[N, 3, H, W] as N pictures of 8 bits, which are places in a table of the values of each channel."""
    tables = [pixels[:, channel].unique() for channel in range(3)]
    places = torch.stack([torch.searchsorted(t, pixels[:, c].contiguous()) for c, t in enumerate(tables)], dim=-1)
    (target / PICTURES).mkdir(exist_ok=True)
    pictures = [f"{PICTURES}/{name}_{i}.png" for i in range(len(pixels))]
    for file, picture in zip(pictures, places, strict=True):
        Image.fromarray(picture.numpy().astype(np.uint8)).save(target / file, optimize=True)
    return {"pictures": pictures, "values": [_keep(table, pool) for table in tables]}


def _unpack(entry: Any, pool: dict[str, Tensor], source: Path) -> Tensor:
    if isinstance(entry, list):
        return pool[entry[0]].clone() if len(entry) == 1 else torch.cat([pool[key] for key in entry])
    pictures = np.stack([np.asarray(Image.open(source / file)) for file in entry["pictures"]])
    places = torch.from_numpy(pictures).long()
    return torch.stack([pool[key][places[..., channel]] for channel, key in enumerate(entry["values"])], dim=1)


def _keep(tensor: Tensor, pool: dict[str, Tensor]) -> str:
    """Key of a tensor in the pool: what it holds."""
    content = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes()
    key = hashlib.sha256(content).hexdigest()[:16]
    pool.setdefault(key, tensor.clone(memory_format=torch.contiguous_format))
    return key


if __name__ == "__main__":
    shared = Path(sys.argv[1])
    pack(shared / "golden")
    pack(shared / "golden-more" / "cases", MORE, SELECTION)
