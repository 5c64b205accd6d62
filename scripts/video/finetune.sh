#!/usr/bin/env bash
# Finetune Video-LLaVA, projector and language model, on instructions about images and clips. Variables of the
# environment replace the defaults below, and flags given to this script replace the flags below:
#
#   OUTPUT_DIR=./checkpoints/mine bash scripts/video/finetune.sh --num_train_epochs 2
#
# The global batch stays 128, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
RECIPES=_video
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data/llava_all_image_video}" # of the clips too
JSON_FOLDER="$IMAGE_FOLDER/ft_json"
DATA_PATH="${DATA_PATH:-$JSON_FOLDER/llava_image_tune_.json,$JSON_FOLDER/videochatgpt_tune_.json,$JSON_FOLDER/nlp_tune.json}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/videollava-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/videollava-7b$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero3.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower LanguageBind/LanguageBind_Image \
    --video_tower LanguageBind/LanguageBind_Video_merge \
    --num_frames 8 \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "$OUTPUT_DIR" \
    --per_device_train_batch_size 16 \
    --global_batch_size 128 \
    --save_steps 50000 \
    --learning_rate 2e-5 \
    --model_max_length 3072 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
