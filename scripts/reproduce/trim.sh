#!/usr/bin/env bash
# TRIM (https://arxiv.org/abs/2409.10994), from the downloads to the report; variables: common.sh beside this.
#
# Main rows: table 1, LLaVA-1.5 as released, finetuned in full with TRIM from LLaVA-1.5's own projector, and the same
# model asked with the top 5 % of the tokens (the paper does not say whether that was trained).
set -euo pipefail
PAPER=trim
MAIN_ROWS="7b 7b-trim 7b-trim-5 13b 13b-trim 13b-trim-5"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TWELVE=vqav2,gqa,vizwiz,scienceqa,textvqa,pope,mme,mmbench,mmbench_cn,seed_img,llavabench,mmvet

for size in 7b 13b; do
    evaluate "$size" "${LLAVA[$size]}" "$TWELVE" --reduction none
    finetune "$size-trim" "$size" configs/trim/finetune.yaml
    evaluate "$size-trim" "$(trained "$size-trim")" "$TWELVE"
    evaluate "$size-trim-5" "$(trained "$size-trim")" "$TWELVE" --reduction '{"name": "trim", "ratio": 0.05}'
    called "$size-trim-5" "TRIM (top 5%)"
done

report_and_run
