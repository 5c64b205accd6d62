#!/usr/bin/env bash
# MMBench dev. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmbench "$@"
