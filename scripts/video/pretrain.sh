#!/usr/bin/env bash
# Pretrain the projector of Video-LLaVA, on captions of images and clips. Variables of the environment replace the
# defaults below, and flags given to this script replace the flags below:
#
#   OUTPUT_DIR=./checkpoints/mine bash scripts/video/pretrain.sh --num_frames 16
#
# The global batch stays 256, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
RECIPES=_video
SCRIPT_IGNORES=PRETRAIN_MM_MLP_ADAPTER # what is trained here
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data/llava_all_image_video}" # of the clips too
JSON_FOLDER="$IMAGE_FOLDER/pt_json"
DATA_PATH="${DATA_PATH:-$JSON_FOLDER/llava_image_.json,$JSON_FOLDER/valley_.json}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/videollava-7b-pretrain$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    "${COMMON_FLAGS[@]}" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower LanguageBind/LanguageBind_Image \
    --video_tower LanguageBind/LanguageBind_Video_merge \
    --num_frames 8 \
    --tune_mm_mlp_adapter True \
    --output_dir "$OUTPUT_DIR" \
    --per_device_train_batch_size 32 \
    --global_batch_size 256 \
    --dataloader_num_workers 8 \
    --save_steps 24000 \
    --learning_rate 1e-3 \
    --model_max_length 3072 \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
