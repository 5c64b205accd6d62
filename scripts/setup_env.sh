#!/usr/bin/env bash
# Makes or reuses the environment `.venv` at the root of the repository and activates it.
#
#   bash scripts/setup_env.sh [EXTRAS]            # from a terminal; EXTRAS defaults to train,dev
#   source scripts/setup_env.sh; setup_env train  # from another script, which then runs inside .venv
#
# Installing is skipped while pyproject.toml, this file and EXTRAS are what the last installation saw.
# PYTHON chooses the interpreter (3.11 or newer) that a new .venv is made with.
set -euo pipefail

LLAVA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The release of torch that CPU-only machines get: the newest one that DeepSpeed's CPU backend was tested with.
CPU_TORCH="torch==2.13.0"
LMMS_EVAL="lmms-eval==0.7.3"

_make_venv() {
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: $python is missing or older than 3.11; name a newer one: PYTHON=python3.12" >&2
        return 1
    }
    echo "setup: making .venv with $("$python" --version)" >&2
    "$python" -m venv "$LLAVA_ROOT/.venv" || {
        echo "setup: python's venv module failed (on Debian and Ubuntu: apt install python3-venv)" >&2
        return 1
    }
}

_torch_requirement() {
    if nvidia-smi -L >/dev/null 2>&1; then echo "torch"; else echo "$CPU_TORCH"; fi
}

setup_env() {
    local extras="${1:-train,dev}" venv="$LLAVA_ROOT/.venv" torch stamp warn=()
    "$venv/bin/python" -c '' 2>/dev/null || _make_venv || return 1
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    torch="$(_torch_requirement)"
    stamp="$(cat "$LLAVA_ROOT/pyproject.toml" "$LLAVA_ROOT/scripts/setup_env.sh" - <<<"$extras $torch" |
        python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    if grep -qsx "$stamp" "$venv/llava-setup"; then
        return 0
    fi
    command -v g++ >/dev/null ||
        echo "setup: no g++ found; DeepSpeed compiles an extension with it (apt install g++)" >&2
    echo "setup: installing $torch (1/2)" >&2
    python -m pip install --quiet --quiet "$torch" || return 1
    echo "setup: installing llava[$extras] and what it needs (2/2)" >&2
    if [[ ",$extras," == *,lmms-eval,* ]]; then
        # Not with its own requirements; pyproject.toml has those that it imports, and says why. pip would list the rest.
        python -m pip install --quiet --quiet --no-deps "$LMMS_EVAL" || return 1
        warn=(--no-warn-conflicts)
    fi
    python -m pip install --quiet --quiet "${warn[@]}" -e "$LLAVA_ROOT[$extras]" || return 1
    echo "$stamp" >>"$venv/llava-setup"
    echo "setup: done" >&2
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    setup_env "$@"
fi
