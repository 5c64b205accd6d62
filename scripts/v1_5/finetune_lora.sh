#!/usr/bin/env bash
# Finetune LLaVA-1.5 on instructions with LoRA: adapters of the language model, and the projector. Variables of
# the environment replace the defaults below, and flags given to this script replace the flags below:
#
#   REDUCTION=prumerge OUTPUT_DIR=./checkpoints/mine bash scripts/v1_5/finetune_lora.sh --lora_r 64
#
# The global batch stays 128, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

DATA_PATH="${DATA_PATH:-./playground/data/llava_v1_5_mix665k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-lora$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero3.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "$OUTPUT_DIR" \
    --per_device_train_batch_size 16 \
    --global_batch_size 128 \
    --save_steps 50000 \
    --learning_rate 2e-4 \
    --model_max_length 2048 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
