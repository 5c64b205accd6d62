#!/usr/bin/env bash
# MMBench-CN dev. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmbench_cn "$@"
