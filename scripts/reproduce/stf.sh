#!/usr/bin/env bash
# STF (https://arxiv.org/abs/2506.07138), from the downloads to the report; variables: common.sh beside this.
#
# Main rows: table 2, LLaVA-1.5 as released, and pretrained and finetuned in full with STF and with AvgPool.
# Further rows: table 3, one of its two parts; table 4, kernels k and tokens E; table 5, TokenConcat.
set -euo pipefail
PAPER=stf
MAIN_ROWS="7b stf avgpool"
MORE_ROWS="mbtf-only stf-without-mbtf stf-k2-e2 stf-k4-e4 stf-k4-e8 stf-k8-e16 stf-k8-e32 token_concat"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
EIGHT=gqa,scienceqa,textvqa,pope,mmbench,mmbench_cn,vqav2,vizwiz

# row NAME [key=value...]: both stages of STF's recipe with other settings, and its benchmarks.
row() {
    pretrain_and_finetune "$1" stf "${@:2}"
    evaluate "$1" "$(trained "$1")" "$EIGHT"
}

evaluate 7b "${LLAVA[7b]}" "$EIGHT" --reduction none
row stf
row avgpool 'reduction={name: avgpool, kernel: 2}'
row mbtf-only reduction.projector.kernel=1
called mbtf-only "STF (MBTF only)"
row stf-without-mbtf reduction.projector.mbtf=off
called stf-without-mbtf "STF (without MBTF)"
for pair in "2 2" "4 4" "4 8" "8 16" "8 32"; do
    read -r kernel tokens <<<"$pair"
    row "stf-k$kernel-e$tokens" "reduction.projector.kernel=$kernel" "reduction.projector.tokens_out=$tokens"
    called "stf-k$kernel-e$tokens" "STF (k=$kernel, E=$tokens)"
done
row token_concat 'reduction={name: token_concat, kernel: 2}'

report_and_run
