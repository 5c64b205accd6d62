#!/usr/bin/env bash
# MMStar val. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmstar "$@"
