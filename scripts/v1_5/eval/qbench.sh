#!/usr/bin/env bash
# Q-Bench dev. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" qbench "$@"
