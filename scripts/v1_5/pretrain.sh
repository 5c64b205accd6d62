#!/usr/bin/env bash
# Pretrain the projector of LLaVA-1.5. Variables of the environment replace the defaults below, and flags given
# to this script replace the flags below:
#
#   OUTPUT_DIR=./checkpoints/mine bash scripts/v1_5/pretrain.sh --learning_rate 5e-4
#
# The global batch stays 256, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
SCRIPT_IGNORES=PRETRAIN_MM_MLP_ADAPTER # what is trained here
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

MODEL="${MODEL:-lmsys/vicuna-7b-v1.5}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA_PATH="${DATA_PATH:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data/LLaVA-Pretrain/images}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-pretrain$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 4 \
    --global_batch_size 256 \
    --eval_strategy "no" \
    --save_strategy "steps" \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
