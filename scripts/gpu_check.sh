#!/usr/bin/env bash
# Checks this code on one GPU, without internet, in two parts of at most ten minutes each: the tests marked `gpu`; then
# `llava bench` on 7B shapes with random weights, every method's answer and training step beside the baseline's.
#
#   bash scripts/gpu_check.sh --wheels DIR [--python 3.12]    # where a registry can be reached: gathers what is needed
#   bash scripts/gpu_check.sh [--from DIR] [--minutes N] [--out DIR]    # on the machine with the GPU
#
# --wheels DIR   only gather: all packages beside torch, under 60 MB, for the Python that --python names
# --from DIR     install from such a folder; without it, from pip's registry, where something is missing
# --minutes N    of each part (10)
# --out DIR      results (outputs/gpu_check): report.md, tests.json, bench.json, traces/ for ui.perfetto.dev
# --device, --model, --method, --rounds, --batch, --dtype, --select    as `python -m benchmarks.gpu_check --help` says
#
# PYTHON names the interpreter (3.11 to 3.13) that has the machine's torch (2.11 or newer), which is never replaced:
# what else is missing goes into a virtual environment in the folder of the results, on top of the machine's packages.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}" out=outputs/gpu_check minutes=10 device=cuda wheels="" from="" version=()
tests=() bench=()

fail() {
    echo "gpu_check: $*" >&2
    exit 2
}

# A path that was given, from the folder in which it was given.
absolute() {
    if [[ "$1" == /* ]]; then echo "$1"; else echo "$here/$1"; fi
}

read_options() {
    while (($#)); do
        (($# > 1)) || fail "$1 needs a value; see the head of this script"
        case "$1" in
        --wheels) wheels="$(absolute "$2")" ;;
        --python) version=(--python "$2") ;;
        --from) from="$(absolute "$2")" ;;
        --minutes) minutes="$2" ;;
        --out) out="$(absolute "$2")" ;;
        --device) device="$2" ;;
        --select) tests+=("$1" "$2") ;;
        --model | --method | --rounds | --batch | --dtype) bench+=("$1" "$2") ;;
        *) fail "unknown option $1; see the head of this script" ;;
        esac
        shift 2
    done
    [[ "$minutes" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes $minutes: expected a number"
}

check_machine() {
    "$python" - "$device" <<'PYTHON' || exit 2
import sys
if not (3, 11) <= sys.version_info < (3, 14):  # transformers 5.23 needs 3.11
    sys.exit(f"gpu_check: Python {sys.version.split()[0]}: expected 3.11 to 3.13; name another one: PYTHON=python3.12")
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check: {sys.executable} can't import torch ({error}); name the one that can: PYTHON=...")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"gpu_check: torch {torch.__version__}: expected 2.11 or newer")
if sys.argv[1].startswith("cuda") and not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; see nvidia-smi")
PYTHON
}

# Whether this Python has all packages, in versions that fit.
is_complete() {
    "$1" -m pip --isolated install --quiet --dry-run --no-index --requirement "$out/requirements.txt" >/dev/null 2>&1
}

# An environment on top of the one that `python` is, be that a virtual one itself; torch stays as it is.
add_packages() {
    local venv="$out/venv" site source=()
    "$python" -m venv --without-pip --system-site-packages "$venv" || fail "$python can't make $venv"
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' >"$site/machine.pth"
    python="$venv/bin/python"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
    [[ -z "$from" ]] || source=(--isolated --no-index --find-links "$from")
    "$python" -c 'import torch; print("torch==" + torch.__version__)' >"$out/constraints.txt"
    echo "gpu_check: installing what is missing beside torch into $venv" >&2
    "$python" -m pip install --quiet --disable-pip-version-check "${source[@]}" \
        --constraint "$out/constraints.txt" --requirement "$out/requirements.txt" ||
        fail "packages are missing: gather them where a registry can be reached (--wheels DIR --python" \
            "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')), bring DIR here, and pass --from DIR"
}

run_part() {
    local part="$1" code=0
    shift
    echo "gpu_check: $part, at most $minutes minutes" >&2
    timeout --kill-after=15 "${minutes}m" "$python" -m benchmarks.gpu_check "$part" --out "$out" --minutes "$minutes" \
        --device "$device" "$@" >"$out/$part.log" 2>&1 || code=$?
    ((code == 0)) || {
        failed+=("$part")
        echo "gpu_check: $part ended with $code; the end of $out/$part.log:" >&2
        tail -n 15 "$out/$part.log" >&2
    }
}

read_options "$@"
if [[ -n "$wheels" ]]; then
    exec "$python" scripts/gather_wheels.py "$wheels" "${version[@]}"
fi
[[ -z "$from" || -d "$from" ]] || fail "--from $from: no such folder; --wheels makes one"
check_machine
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/{tests,bench}.json
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$python" scripts/gather_wheels.py --list >"$out/requirements.txt"
is_complete "$python" || add_packages

failed=()
run_part tests "${tests[@]}"
run_part bench "${bench[@]}"
echo "gpu_check: results in $out/report.md" >&2
((${#failed[@]} == 0)) || fail "failed: ${failed[*]}"
