#!/usr/bin/env bash
# VizWiz test; submit vizwiz/*.json of the output to the server. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" vizwiz "$@"
