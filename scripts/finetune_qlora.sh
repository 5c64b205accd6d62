#!/usr/bin/env bash
# Finetune with QLoRA: the language model in 4 bits, adapters of it, and the projector; on LLaVA-1.5's models and data,
# with the hyperparameters of LLaVA's script of this name. Variables of the environment replace the defaults below, and
# flags given to this script replace the flags below:
#
#   DATA_PATH=mine.json OUTPUT_DIR=./checkpoints/mine bash scripts/finetune_qlora.sh --lora_r 128 --lora_alpha 256
#
# It needs a GPU and bitsandbytes: pip install 'llava[qlora]'.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

DATA_PATH="${DATA_PATH:-./playground/data/llava_v1_5_mix665k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-qlora$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --lora_enable True --bits 4 \
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
    --learning_rate 2e-5 \
    --model_max_length 2048 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
