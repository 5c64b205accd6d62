#!/usr/bin/env bash
# MM-Vet; --judge-model NAME grades the answers. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mmvet "$@"
