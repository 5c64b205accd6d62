"""The packages that `scripts/gpu_check.sh` needs beside torch, as wheels in a folder, for a machine without internet.

    python scripts/gather_wheels.py FOLDER [--python 3.12] [--platform manylinux_2_28_x86_64]
    python scripts/gather_wheels.py --list        # what they are, a requirement a line

It needs pip and a registry, and nothing else: no torch, and none of the packages themselves.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 60_000_000
TESTS = ("pytest",)
# Stands in for torch while pip finds out what the rest needs, so that it fetches neither torch nor CUDA.
STAND_IN = "9999"


def requirements() -> list[str]:
    """What pyproject.toml lists, without torch, and what runs tests."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{ROOT / 'pyproject.toml'} has no list of dependencies")
    kept = [one for one in ast.literal_eval(found.group(1)) if not re.match(r"torch\b", one)]
    dev = re.search(r"^dev = (\[.*?\])", text, re.MULTILINE)
    return kept + [
        one for one in ast.literal_eval(dev.group(1) if dev else "[]") if re.split(r"[<>=]", one)[0] in TESTS
    ]


def _name(requirement: str) -> str:
    return re.split(r"[<>=~!\[]", requirement)[0]


def write_stand_in(folder: Path) -> None:
    """A wheel of torch with nothing in it."""
    info = f"torch-{STAND_IN}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{STAND_IN}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {STAND_IN}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def platforms(newest: str) -> list[str]:
    """A platform of pip and the older ones that it runs: manylinux_2_28_x86_64, and so on down to manylinux2014."""
    found = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", newest)
    if found is None:
        return [newest]
    machine = found.group(2)
    return [f"manylinux_2_{minor}_{machine}" for minor in range(int(found.group(1)), 16, -1)] + [
        f"manylinux2014_{machine}"
    ]


def gather(folder: Path, python: str, newest_platform: str) -> int:
    """Fill a folder with wheels.

    Args:
        folder: made where it is missing; wheels that are there already stay.
        python: the version that will use them, such as 3.12.
        newest_platform: as pip calls it.

    Returns:
        Bytes of the wheels.

    Raises:
        ValueError: they are too large, as where the folder held those for another Python.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_stand_in(scratch)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        only = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
        only += [part for one in platforms(newest_platform) for part in ("--platform", one)]
        limits = scratch / "limits.txt"
        limits.write_text(f"torch=={STAND_IN}\n", encoding="utf-8")
        download = [*pip, "download", "--quiet", *only, "--find-links", name, "--dest", str(folder)]
        # The machine's own limits may name a torch.
        subprocess.run([*download, *requirements()], check=True, env={**os.environ, "PIP_CONSTRAINT": str(limits)})
    (folder / f"torch-{STAND_IN}-py3-none-any.whl").unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise ValueError(
            f"{folder} holds {size / 1e6:.1f} MB of wheels, more than {MOST_BYTES / 1e6:.0f}: gather for one Python a "
            "folder, beginning with an empty one"
        )
    return size


def main() -> None:
    """Gather, or list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="for the wheels")
    parser.add_argument("--list", action="store_true", help="only say what is needed")
    parser.add_argument("--python", default=".".join(platform.python_version_tuple()[:2]), help="that will use them")
    parser.add_argument("--platform", default=f"manylinux_2_28_{platform.machine()}", help="as pip calls it")
    options = parser.parse_args()
    if options.list:
        sys.stdout.write("".join(f"{one}\n" for one in requirements()))
        return
    if options.folder is None:
        parser.error("name a folder for the wheels")
    if not re.fullmatch(r"3\.1[1-3]", options.python):
        parser.error(f"--python {options.python}: expected 3.11 to 3.13; transformers has no wheel for older ones")
    try:
        size = gather(options.folder, options.python, options.platform)
    except subprocess.CalledProcessError as error:
        sys.exit(f"gather_wheels: pip ended with {error.returncode}; what it said stands above")
    except ValueError as error:
        sys.exit(f"gather_wheels: {error}")
    number = len(list(options.folder.glob("*.whl")))
    sys.stdout.write(f"{number} wheels for Python {options.python} in {options.folder}: {size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
