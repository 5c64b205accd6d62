#!/usr/bin/env bash
# MSRVTT-QA; --judge-model NAME grades the answers. Variables and flags: run.sh; CKPT is Video-LLaVA-7B by default.
export CKPT="${CKPT:-Video-LLaVA-7B}" HUB="${HUB:-LanguageBind}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" msrvtt_qa "$@"
