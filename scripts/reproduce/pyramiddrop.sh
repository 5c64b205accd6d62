#!/usr/bin/env bash
# PyramidDrop (https://arxiv.org/abs/2410.17247), from the downloads to the report; variables: common.sh beside this.
#
# Main rows: tables 1 and 2, LLaVA-1.5 as released and finetuned with PyramidDrop, LLaVA-NeXT (5 patches) pretrained and
# finetuned without and with it; table 5, PyramidDrop and FastV at inference only.
# Further rows: table 3, FastV on the model that PyramidDrop trained; table 4, other shares lambda.
# Not here: the rows of 9 patches, whose resolutions the paper does not give.
set -euo pipefail
PAPER=pyramiddrop
MAIN_ROWS="7b 7b-pdrop 7b-pdrop-free 7b-fastv-free next next-pdrop next-pdrop-free next-fastv-free"
MORE_ROWS="next-pdrop-fastv 7b-pdrop-0.4 7b-pdrop-0.6 next-pdrop-0.4 next-pdrop-0.6"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SIX=mme,mmbench,mmbench_cn,seed_img,mmstar,pope                               # table 1
EIGHT=docvqa,infovqa,textvqa,chartqa,ocrvqa,vqav2,vizwiz,gqa                  # table 2
SEVEN=mme,mmbench,gqa,mmbench_cn,seed_img,docvqa,infovqa                      # table 4
FREE=mme,scienceqa,mmbench_cn,gqa,pope,textvqa,chartqa,docvqa                 # table 5
LAMBDAS=("0.4 [0.4,0.16,0.064]" "0.6 [0.6,0.36,0.216]")

# LLaVA-1.5: its own pretraining, and PyramidDrop in finetuning.
evaluate 7b "${LLAVA[7b]}" "$SIX,scienceqa,gqa,textvqa,chartqa,docvqa,infovqa" --reduction none
finetune 7b-pdrop 7b configs/pyramiddrop/finetune.yaml
evaluate 7b-pdrop "$(trained 7b-pdrop)" "$SIX,gqa,docvqa,infovqa"
evaluate 7b-pdrop-free "${LLAVA[7b]}" "$FREE" --reduction pyramiddrop
evaluate 7b-fastv-free "${LLAVA[7b]}" "$FREE" --reduction fastv

# LLaVA-NeXT: both stages drop.
pretrain_and_finetune next llava_next
evaluate next "$(trained next)" "$SIX,$EIGHT,scienceqa"
pretrain_and_finetune next-pdrop pyramiddrop_next
evaluate next-pdrop "$(trained next-pdrop)" "$SIX,$EIGHT,scienceqa"
evaluate next-pdrop-free "$(trained next)" "$FREE" --reduction pyramiddrop
evaluate next-fastv-free "$(trained next)" "$FREE" --reduction fastv

evaluate next-pdrop-fastv "$(trained next-pdrop)" chartqa,docvqa,textvqa,mme,scienceqa,pope --reduction fastv
called next-pdrop-fastv "FastV (trained with PyramidDrop)"
for pair in "${LAMBDAS[@]}"; do
    read -r lambda ratios <<<"$pair"
    finetune "7b-pdrop-$lambda" 7b configs/pyramiddrop/finetune.yaml "reduction.decoder.ratios=$ratios"
    evaluate "7b-pdrop-$lambda" "$(trained "7b-pdrop-$lambda")" "$SEVEN"
    called "7b-pdrop-$lambda" "PyramidDrop (lambda $lambda)"
    pretrain_and_finetune "next-pdrop-$lambda" pyramiddrop_next "reduction.decoder.ratios=$ratios"
    evaluate "next-pdrop-$lambda" "$(trained "next-pdrop-$lambda")" "$SEVEN"
    called "next-pdrop-$lambda" "PyramidDrop (lambda $lambda)"
done

report_and_run
