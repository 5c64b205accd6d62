#!/usr/bin/env bash
# Evaluate a checkpoint on tasks; the scripts beside this one name them, and take the same variables.
#
#   CKPT=llava-v1.5-7b bash scripts/v1_5/eval/run.sh pope,gqa [FLAGS OF llava eval]
#
# CKPT        name of the checkpoint; results go to outputs/eval/$CKPT
# MODEL_PATH  its folder or hub name; default: ./checkpoints/$CKPT if it is there, otherwise $HUB/$CKPT
# HUB         whose checkpoint on the hub; default: liuhaotian
# MODEL_BASE  base of a LoRA folder
# REDUCTION   a method in place of the checkpoint's own: a name, JSON, or none
# CONV_MODE   prompt template; default: by the checkpoint's language model
# DATA        folder of the benchmarks' files; default: playground/data/eval
# OUTPUT      in place of outputs/eval/$CKPT
# CUDA_VISIBLE_DEVICES  the GPUs; one process runs on each
set -euo pipefail
LLAVA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"

tasks="${1:?name the tasks, such as pope,gqa}"
shift
CKPT="${CKPT:-llava-v1.5-13b}"
flags=(--task "$tasks" --output "${OUTPUT:-outputs/eval/$CKPT}" --data "${DATA:-playground/data/eval}")
[[ -z "${MODEL_BASE:-}" ]] || flags+=(--model-base "$MODEL_BASE")
[[ -z "${REDUCTION:-}" ]] || flags+=(--reduction "$REDUCTION")
[[ -z "${CONV_MODE:-}" ]] || flags+=(--conv-mode "$CONV_MODE")

if [[ -z "${VIRTUAL_ENV:-}" && -f "$LLAVA_ROOT/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "$LLAVA_ROOT/.venv/bin/activate"
fi
if [[ -z "${MODEL_PATH:-}" ]]; then
    if [[ -d "checkpoints/$CKPT" ]]; then MODEL_PATH="checkpoints/$CKPT"; else MODEL_PATH="${HUB:-liuhaotian}/$CKPT"; fi
fi
exec llava eval "$MODEL_PATH" "${flags[@]}" "$@"
