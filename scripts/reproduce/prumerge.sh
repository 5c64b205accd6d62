#!/usr/bin/env bash
# PruMerge (https://arxiv.org/abs/2403.15388), from the downloads to the report; variables: common.sh beside this.
#
# Main rows: tables 1 and 6, LLaVA-1.5 as released, finetuned with LoRA on reduced tokens, and without training.
# Further rows: table 3, Video-LLaVA without training, at the tokens that the paper names (32 and 64 of a frame), judged by
# JUDGE_MODEL (the paper: gpt-3.5-turbo); table 4, ways of sampling as many tokens as PruMerge takes on a task; table 7,
# half of the tokens.
# Not here: of table 7 methods of others; what was trained for table 5 is not said.
set -euo pipefail
PAPER=prumerge
MAIN_ROWS="7b 7b-prumerge-free 7b-prumerge 7b-prumerge_plus 13b 13b-prumerge 13b-prumerge_plus"
MORE_ROWS="sequential-40 spatial-5x8 spatial-8x5 sequential-35 spatial-5x7 spatial-7x5 spatial-6x6 sequential-16 spatial-4x4"
MORE_ROWS+=" 7b-prumerge_plus-half video-7b video-7b-prumerge video-7b-prumerge_plus"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SIX=vqav2,scienceqa,textvqa,pope,mme,mmbench

for size in 7b 13b; do
    evaluate "$size" "${LLAVA[$size]}" "$SIX" --reduction none
    for method in prumerge prumerge_plus; do
        row="$size-$method"
        finetune "$row" "$size" "configs/$method/finetune_lora.yaml"
        evaluate "$row" "$(trained "$row")" "$SIX" --model-base "${VICUNA[$size]}"
    done
done

evaluate 7b-prumerge-free "${LLAVA[7b]}" scienceqa,textvqa,pope,mme --reduction prumerge
called 7b-prumerge-free "PruMerge (no fine-tuning)"

finetune 7b-prumerge_plus-half 7b configs/prumerge_plus/finetune_lora.yaml reduction.encoder.ratio=0.25
evaluate 7b-prumerge_plus-half "$(trained 7b-prumerge_plus-half)" "$SIX" --model-base "${VICUNA[7b]}"

# sampled TASKS TOKENS ROWSxCOLUMNS...: the first tokens, and grids of about as many.
sampled() {
    local tasks="$1" tokens="$2" grid
    shift 2
    evaluate "sequential-$tokens" "${LLAVA[7b]}" "$tasks" --reduction "{\"name\": \"sequential\", \"tokens\": $tokens}"
    for grid in "$@"; do
        evaluate "spatial-$grid" "${LLAVA[7b]}" "$tasks" \
            --reduction "{\"name\": \"spatial\", \"rows\": ${grid%x*}, \"columns\": ${grid#*x}}"
        called "spatial-$grid" "spatial $grid"
    done
}
sampled textvqa,mme 40 5x8 8x5
sampled pope 35 5x7 7x5 6x6
sampled scienceqa 16 4x4

VIDEO_LLAVA="${VIDEO_LLAVA_7B:-LanguageBind/Video-LLaVA-7B}"
THREE=msvd_qa,msrvtt_qa,activitynet_qa
evaluate video-7b "$VIDEO_LLAVA" "$THREE" --reduction none
evaluate video-7b-prumerge "$VIDEO_LLAVA" "$THREE" --reduction '{"name": "prumerge", "ratio": 0.125}'
evaluate video-7b-prumerge_plus "$VIDEO_LLAVA" "$THREE" --reduction '{"name": "prumerge_plus", "ratio": 0.25}'

report_and_run
