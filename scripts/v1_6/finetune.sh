#!/usr/bin/env bash
# Finetune LLaVA-NeXT, projector and language model, on instructions. Variables of the environment replace the
# defaults below, and flags given to this script replace the flags below:
#
#   OUTPUT_DIR=./checkpoints/mine bash scripts/v1_6/finetune.sh --num_train_epochs 2
#
# The global batch stays 128, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
RECIPES=_next
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

DATA_PATH="${DATA_PATH:-./playground/data/open-llava-next_instruct_mix1M.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/llava-v1.6-vicuna-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.6-vicuna-7b$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --mm_vision_select_feature patch \
    --mm_patch_merge_type spatial_unpad \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]" \
    --group_by_modality_length True \
    --unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-6 \
    --output_dir "$OUTPUT_DIR" \
    --per_device_train_batch_size 4 \
    --global_batch_size 128 \
    --save_steps 50000 \
    --learning_rate 2e-5 \
    --model_max_length 4096 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
