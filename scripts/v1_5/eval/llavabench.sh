#!/usr/bin/env bash
# LLaVA-Bench-in-the-wild; --judge-model NAME grades the answers. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" llavabench "$@"
