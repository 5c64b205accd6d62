#!/usr/bin/env bash
# MME. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mme "$@"
