#!/usr/bin/env bash
# InfoVQA val. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" infovqa "$@"
