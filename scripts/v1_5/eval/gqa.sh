#!/usr/bin/env bash
# GQA, testdev-balanced. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" gqa "$@"
