#!/usr/bin/env bash
# ScienceQA, questions with an image and all. Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" scienceqa "$@"
