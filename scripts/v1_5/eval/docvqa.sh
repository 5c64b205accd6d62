#!/usr/bin/env bash
# DocVQA val. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" docvqa "$@"
