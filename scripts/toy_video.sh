#!/usr/bin/env bash
# A model of clips in a few minutes, on the toy world that needs no download and no GPU:
#
#   bash scripts/toy_video.sh
#
# draws clips of shapes that move, follow one another and are counted, pretrains a projector on still pictures, finetunes
# on the clips' frames, and once more on one frame of each, then asks both models about clips that neither has seen, with
# every method in the first, and prints the tables of docs/video.md. What is there already is kept.
#
# OUTPUT names another folder for what is trained (default: outputs/toy_video), METHODS some methods for the table
# (default: all; names with commas between), and PYTHON the interpreter for .venv. One process trains: more would change
# the size of a batch, which is small here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n[%s/5 after %s s] %s\n' "$1" "$SECONDS" "$2"; }

source scripts/setup_env.sh
setup_env train
NUM_GPUS=1
source scripts/toy_settings.sh
DATA=playground/data/toy_clips
OUTPUT="${OUTPUT:-outputs/toy_video}"
FRAMES=4

step 1 "data: clips, and still pictures for the projector, in $DATA"
python playground/toy/clips.py --output "$DATA" --train 4800 --heldout 100
python playground/toy/generate.py --output "$DATA/stills" --pretrain 2400 --finetune 0 --heldout 0 --objects 2

step 2 "pretraining the projector on still pictures: scripts/v1_5/pretrain.sh"
DATA_PATH="$DATA/stills/pretrain.json" IMAGE_FOLDER="$DATA/stills/images" OUTPUT_DIR="$OUTPUT/pretrain" \
    bash scripts/v1_5/pretrain.sh "${flags[@]}" --learning_rate 2e-3

# NUM_FRAMES FOLDER: projector and language model on the clips.
finetune() {
    DATA_PATH="$DATA/train.json" OUTPUT_DIR="$OUTPUT/$2" DEEPSPEED_CONFIG=scripts/zero2.json \
        PRETRAIN_MM_MLP_ADAPTER="$OUTPUT/pretrain/mm_projector.bin" \
        bash scripts/v1_5/finetune.sh "${flags[@]}" --video_folder "$DATA/videos" --image_folder "$DATA/videos" \
        --num_frames "$1" --learning_rate 1e-3 --per_device_train_batch_size 8
}
step 3 "finetuning on $FRAMES frames of each clip: scripts/v1_5/finetune.sh --num_frames $FRAMES"
finetune "$FRAMES" frames

step 4 "the same with one frame of each: --num_frames 1"
finetune 1 one-frame

step 5 "held-out questions"
python playground/toy/clip_report.py --frames "$OUTPUT/frames" --one-frame "$OUTPUT/one-frame" --data "$DATA" \
    --num-frames "$FRAMES" ${METHODS:+--methods "$METHODS"}
printf '\nDone after %s s. Checkpoints: %s\n' "$SECONDS" "$OUTPUT"
