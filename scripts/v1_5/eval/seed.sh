#!/usr/bin/env bash
# SEED-Bench, pictures and middle frames of clips (task seed_img: pictures alone). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" seed "$@"
