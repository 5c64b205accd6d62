"""Samples as a table of `datasets`: Arrow on disk, mapped into memory, so that no process holds the data.

A file is converted once. Each sample is kept as the JSON text of what its file has, because LLaVA's samples share no
schema: ids are numbers or texts, `image` is missing, a name or a list, and any key may be added. Beside it stand the
few columns that are read for all samples at once. A sample that cannot be trained on stays in the table, with the
reason, so that it keeps its place whether it stops the run or is skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from llava.conversation import Template, get_template
from llava.data.records import DataError, Malformed, read_records, reading
from llava.data.samples import FORMAT, BadSampleError, check_sample, sample_name, split_pictures, with_clip_marks
from llava.files import check_writable

FORMAT_VERSION = 3
"""Part of the cache's key: raise it when the columns or the checks change."""


def import_datasets() -> Any:
    """The module `datasets`.

    Raises:
        ValueError: it is not installed; the message names the extra.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError('reading data needs the package datasets: pip install "llava[train]"') from error
    return datasets


def features() -> Any:
    """The columns of a table.

    sample: JSON text. file, index: where it stands. words: of its questions and answers. images, clips: how many.
    pictures: contents of images that the sample holds itself. kind, problem: what is wrong with it, otherwise null.
    """
    d = import_datasets()
    return d.Features(
        {
            "sample": d.Value("large_string"),
            "file": d.Value("string"),
            "index": d.Value("int64"),
            "words": d.Value("int32"),
            "images": d.Value("int32"),
            "clips": d.Value("int32"),
            "pictures": d.List(d.Value("large_binary")),
            "kind": d.Value("string"),
            "problem": d.Value("string"),
        }
    )


def rows(files: list[str], version: str) -> Iterator[dict[str, Any]]:
    """Rows of a table, for files that are read one after the other.

    Args:
        files: paths or URLs. A list, by which `datasets` deals files to processes.
        version: name of the template that the samples will be written in.

    Raises:
        DataError: see `llava.data.records.read_records`; also a file without samples.
    """
    template = get_template(version)
    for file in files:
        index = -1
        for index, sample in enumerate(read_records(file)):
            yield _row(sample, file, index, template)
        if index < 0:
            raise DataError(f"no samples in data file {file!r}; fill it, or leave it out of data_path")


def _row(sample: Any, file: str, index: int, template: Template) -> dict[str, Any]:
    sample, pictures = split_pictures(with_clip_marks(sample))
    problem = sample.reason if isinstance(sample, Malformed) else None
    row = {
        "sample": json.dumps(None if problem else sample, default=str),
        "file": file,
        "index": index,
        "words": 0,
        "images": 0,
        "clips": 0,
        "pictures": pictures or None,
        "kind": FORMAT if problem else None,
        "problem": problem,
    }
    if problem:
        return row
    try:
        turns, names, clips = check_sample(sample, sample_name(sample, index, file), template)
    except BadSampleError as error:
        return {**row, "kind": error.kind, "problem": str(error)}
    words = sum(len(text.split()) for texts in turns for text in texts if text)
    return {**row, "words": words, "images": len(names), "clips": len(clips)}


def load_table(file: str, version: str, cache_dir: str | None = None) -> Any:
    """The table of one file: converted, or as it was converted before.

    The cache is keyed by the file's path, size and time of change (what the file system of a URL has for them). It is
    written under another name and renamed, under a lock, so processes may ask for it at the same time.

    Args:
        file: path or URL.
        version: name of the template that the samples will be written in.
        cache_dir: default: that of `datasets`, $HF_DATASETS_CACHE.

    Returns:
        A `datasets.Dataset` with the columns of `features`.

    Raises:
        ValueError: see `llava.data.records.read_records`; or the cache can't be written. Bad samples raise nothing.
    """
    datasets = import_datasets()
    check_writable(cache_dir or datasets.config.HF_DATASETS_CACHE, "the cache of converted data (HF_DATASETS_CACHE)")
    try:
        return datasets.Dataset.from_generator(
            rows,
            features=features(),
            cache_dir=cache_dir,
            gen_kwargs={"files": [file], "version": version},
            fingerprint=_fingerprint(file, version),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _fingerprint(file: str, version: str) -> str:
    import fsspec

    with reading(file):
        system, path = fsspec.core.url_to_fs(file)
        state = system.ukey(path)
    key = [FORMAT_VERSION, file, state, get_template(version).name]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def stream_table(files: list[str], version: str) -> Any:
    """The same rows as a `datasets.IterableDataset`, read when they are asked for; nothing is written."""
    datasets = import_datasets()
    return datasets.IterableDataset.from_generator(
        rows, features=features(), gen_kwargs={"files": files, "version": version}
    )
