#!/usr/bin/env bash
# Pretrain the projector of LLaVA-NeXT. Variables of the environment replace the defaults below, and flags given
# to this script replace the flags below:
#
#   OUTPUT_DIR=./checkpoints/mine bash scripts/v1_6/pretrain.sh --learning_rate 5e-4
#
# The global batch stays 256, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
RECIPES=_next
SCRIPT_IGNORES=PRETRAIN_MM_MLP_ADAPTER # what is trained here
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

DATA_PATH="${DATA_PATH:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data/LLaVA-Pretrain/images}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.6-vicuna-7b-pretrain$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version plain \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_feature patch \
    --mm_patch_merge_type spatial_unpad \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]" \
    --output_dir "$OUTPUT_DIR" \
    --per_device_train_batch_size 8 \
    --global_batch_size 256 \
    --save_steps 50000 \
    --learning_rate 1e-3 \
    --model_max_length 4096 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
