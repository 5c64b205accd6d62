"""Memory of a process and time to open, for data of several sizes: does it grow with the data?

    python benchmarks/data_memory.py [--records 70000 700000] [--items 20000]

Writes conversations of about LLaVA's size as one JSON file, converts it, and opens it in a process of its own, which
then reads random samples (their text, as no images are written). Anonymous memory is the process's own; what is mapped
from files is shared by all processes and given back when memory is short. Beside it, the same file by json.load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "a the in of image photo there is are red blue man woman dog street table standing next to with on"
WORDS = TEXT.split()


def write_records(path: Path, count: int) -> None:
    """LLaVA's mix has 665k conversations in 1.03 GB; these are of that size."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for index in range(count):
            turns = [
                {"from": "gpt" if turn % 2 else "human", "value": " ".join(draw.choices(WORDS, k=48))}
                for turn in range(6)
            ]
            sample: dict = {"id": index if index % 3 else f"{index:012}", "conversations": turns}
            if index % 17:
                sample["image"] = f"coco/train2017/{index:012}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            file.write(("," if index else "") + json.dumps(sample))
        file.write("]")


def memory() -> dict[str, float]:
    """MiB of this process: its own, and mapped from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def open_table(path: str, items: int) -> None:
    """In a process of its own: print what opening and reading takes."""
    from llava.data import LazySupervisedDataset
    from tests.test_dataset import Letters, processor

    before, start = memory(), time.perf_counter()
    data = LazySupervisedDataset(path, Letters(), processor(), version="v1")
    opened, seconds = memory(), time.perf_counter() - start
    draw = random.Random(0)
    start = time.perf_counter()
    for _ in range(items):
        data.sample(draw.randrange(len(data)))
    rate = items / (time.perf_counter() - start)
    lengths = data.modality_lengths
    del lengths
    after = memory()
    result = {"before": before, "opened": opened, "read": after, "seconds": seconds, "samples_per_s": rate}
    print(json.dumps(result))


def open_json(path: str) -> None:
    """The same by json.load."""
    before, start = memory(), time.perf_counter()
    with Path(path).open(encoding="utf-8") as file:
        samples = json.load(file)
    print(json.dumps({"before": before, "read": memory(), "seconds": time.perf_counter() - start}))
    del samples


def in_process(kind: str, path: Path, items: int, cache: Path) -> dict:
    """Run this script on one file."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--open", kind, str(path), "--items", str(items)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[70_000, 700_000])
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        kind, path = arguments.open
        open_table(path, arguments.items) if kind == "table" else open_json(path)
        return
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder, "data.json"), Path(folder, "cache")
            write_records(path, count)
            first = in_process("table", path, 0, cache)
            again = in_process("table", path, arguments.items, cache)
            loaded = in_process("json", path, 0, cache)
            own = {name: again[name]["own"] - again["before"]["own"] for name in ("opened", "read")}
            mapped = again["read"]["mapped"] - again["before"]["mapped"]
            print(f"{count} records, {path.stat().st_size / 2**20:.0f} MiB of JSON")
            print(f"  converted in {first['seconds']:.1f} s, opened again in {again['seconds']:.2f} s")
            print(
                f"  own memory above that of the imports: {own['opened']:.0f} MiB opened, {own['read']:.0f} MiB after"
            )
            print(f"  {arguments.items} random samples ({again['samples_per_s']:.0f}/s); {mapped:.0f} MiB mapped")
            print(f"  json.load: {loaded['read']['own'] - loaded['before']['own']:.0f} MiB, {loaded['seconds']:.1f} s")


if __name__ == "__main__":
    main()
