#!/usr/bin/env bash
# ChartQA test. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" chartqa "$@"
