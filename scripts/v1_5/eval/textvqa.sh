#!/usr/bin/env bash
# TextVQA val, with OCR tokens in the prompt as LLaVA asks (textvqa_no_ocr asks without). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" textvqa "$@"
