#!/usr/bin/env bash
# VQAv2 test-dev; submit vqav2/*.json of the output to the server. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" vqav2 "$@"
