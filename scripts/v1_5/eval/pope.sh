#!/usr/bin/env bash
# POPE. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" pope "$@"
