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

MODEL="${MODEL:-lmsys/vicuna-7b-v1.5}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA_PATH="${DATA_PATH:-./playground/data/open-llava-next_instruct_mix1M.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/llava-v1.6-vicuna-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.6-vicuna-7b$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero2.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_vision_select_feature patch \
    --mm_patch_merge_type spatial_unpad \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]" \
    --group_by_modality_length True \
    --unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-6 \
    --bf16 True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --global_batch_size 128 \
    --eval_strategy "no" \
    --save_strategy "steps" \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 4096 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    ${GIVEN_FLAGS[@]+"${GIVEN_FLAGS[@]}"} \
    "$@"
