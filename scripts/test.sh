#!/usr/bin/env bash
# All checks, as CI runs them: makes the environment .venv if need be, then lint, format, types and tests.
#
#   bash scripts/test.sh [ARGUMENTS OF PYTEST]    # e.g. bash scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/setup_env.sh
setup_env train,dev,lmms-eval

# Tests run two at a time, and some of them as two processes: more threads would only wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

failed=()
check() {
    printf '\n== %s (after %s s)\n' "$*" "$SECONDS"
    "$@" || failed+=("$1 ${2:-}")
}
check ruff check .
check ruff format --check .
check mypy
check pytest -n 2 "$@"

if ((${#failed[@]})); then
    printf '\nFAILED after %s s: %s\n' "$SECONDS" "${failed[*]}" >&2
    exit 1
fi
printf '\nAll checks passed in %s s.\n' "$SECONDS"
