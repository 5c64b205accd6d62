#!/usr/bin/env bash
# OCRVQA test. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ocrvqa "$@"
