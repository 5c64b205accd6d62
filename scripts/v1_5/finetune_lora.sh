#!/usr/bin/env bash
# Finetune LLaVA-1.5 on instructions with LoRA: adapters of the language model, and the projector. Variables of
# the environment replace the defaults below, and flags given to this script replace the flags below:
#
#   REDUCTION=prumerge OUTPUT_DIR=./checkpoints/mine bash scripts/v1_5/finetune_lora.sh --lora_r 64
#
# The global batch stays 128, on any number of GPUs: gradients are accumulated as often as it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

MODEL="${MODEL:-lmsys/vicuna-7b-v1.5}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA_PATH="${DATA_PATH:-./playground/data/llava_v1_5_mix665k.json}"
IMAGE_FOLDER="${IMAGE_FOLDER:-./playground/data}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
OUTPUT_DIR="${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-lora$OUTPUT_SUFFIX}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-$LLAVA_ROOT/scripts/zero3.json}"

exec "${LAUNCHER[@]}" "$LLAVA_ROOT/llava/train/train_mem.py" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --deepspeed "$DEEPSPEED_CONFIG" \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 4 \
    --global_batch_size 128 \
    --eval_strategy "no" \
    --save_strategy "steps" \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
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
