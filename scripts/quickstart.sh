#!/usr/bin/env bash
# The whole way of a LLaVA model in a few minutes, on a toy world that needs no download and no GPU:
#
#   bash scripts/quickstart.sh
#
# makes the environment .venv, draws the data, pretrains a projector and finetunes with LoRA on the tokens that
# PruMerge leaves, with the scripts and flags that a real model is trained with, then asks both models about
# images that neither has seen and prints what it measured. It can be run again: what is there already, the environment
# and the trained stages, is kept, and a stage that was cut off is trained.
#
# OUTPUT names another folder for what is trained (default: outputs/quickstart), PYTHON the interpreter for .venv, and
# NUM_GPUS the number of processes (default: 1 GPU, or 2 CPU cores).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n[%s/5 after %s s] %s\n' "$1" "$SECONDS" "$2"; }

step 1 "environment"
source scripts/setup_env.sh
setup_env train

source scripts/toy_settings.sh
DATA=playground/data/toy
OUTPUT="${OUTPUT:-outputs/quickstart}"
export IMAGE_FOLDER="$DATA/images"

step 2 "data: images and conversations, in $DATA"
python playground/toy/generate.py --output "$DATA" --pretrain 2400 --finetune 9600 --heldout 100 --objects 2
if [[ -e "$OUTPUT" ]]; then
    echo "$OUTPUT has an earlier run, which is kept. To begin anew: OUTPUT=outputs/again bash scripts/quickstart.sh"
fi

step 3 "pretraining the projector: scripts/v1_5/pretrain.sh"
DATA_PATH="$DATA/pretrain.json" OUTPUT_DIR="$OUTPUT/pretrain" \
    bash scripts/v1_5/pretrain.sh "${flags[@]}" --learning_rate 2e-3

step 4 "LoRA on PruMerge's tokens: scripts/v1_5/finetune_lora.sh --reduction prumerge"
DATA_PATH="$DATA/finetune.json" OUTPUT_DIR="$OUTPUT/lora-prumerge" \
    PRETRAIN_MM_MLP_ADAPTER="$OUTPUT/pretrain/mm_projector.bin" DEEPSPEED_CONFIG=scripts/zero2.json \
    bash scripts/v1_5/finetune_lora.sh "${flags[@]}" --reduction prumerge \
    --lora_r 64 --lora_alpha 128 --learning_rate 2e-3 --mm_projector_lr 2e-3

step 5 "held-out questions"
python playground/toy/report.py --base "$MODEL" --vision-tower "$VISION_TOWER" --data "$DATA" \
    --pretrained "$OUTPUT/pretrain" --lora "$OUTPUT/lora-prumerge" --output "$OUTPUT/answers"
printf '\nDone after %s s. Checkpoints and answers: %s\n' "$SECONDS" "$OUTPUT"
