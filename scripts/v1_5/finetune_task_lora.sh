#!/usr/bin/env bash
# Finetune a trained LLaVA-1.5 further on data of a task of your own, with LoRA. Variables of the environment replace the
# defaults below, and flags given to this script replace the flags below:
#
#   DATA_PATH=mine.json OUTPUT_DIR=./checkpoints/mine bash scripts/v1_5/finetune_task_lora.sh --num_train_epochs 3
#
# The global batch stays 128, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
MODEL="${MODEL:-liuhaotian/llava-v1.5-7b}" # it has a projector: PRETRAIN_MM_MLP_ADAPTER is not read
SCRIPT_IGNORES=PRETRAIN_MM_MLP_ADAPTER
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

DATA_PATH="${DATA_PATH:-./playground/data/llava_v1_5_mix665k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-task-lora$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero3.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
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
