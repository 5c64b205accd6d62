#!/usr/bin/env bash
# Sourced by the papers' scripts beside it, which list a paper's rows as steps. Each is started as
#
#   DRY_RUN=1 bash scripts/reproduce/trim.sh     # shows each command and what it needs; nothing runs
#   bash scripts/reproduce/trim.sh               # runs what is not done yet
#
# Variables:
#   DRY_RUN          1: show commands, downloads, disk and GPU hours
#   ROWS             rows to do, such as 7b,7b-trim; all: the ablations too; default: the main tables
#   ONLY             kinds of steps, such as eval,report; all are pretrain, finetune, eval and report
#   TASKS            benchmarks in place of the paper's, such as pope,gqa
#   OUTPUT           folder for checkpoints, results and the report; default: outputs/reproduce/PAPER
#   NUM_GPUS         processes, a GPU each; default: all GPUs
#   GPU              V100, A100, H100 or H200: that the hours are counted for; default: A100
#   DATA             folder of training data and, under eval, of the benchmarks; default: playground/data
#   CHECKPOINTS      folder of LLaVA-1.5's pretrained projectors; default: checkpoints
#   PRETRAIN         1: pretrain them here in place of the download
#   VICUNA_7B, VICUNA_13B, LLAVA_7B, LLAVA_13B, VIDEO_LLAVA_7B, VISION_TOWER   folders in place of the hub's names
#   PRETRAIN_DATA, PRETRAIN_IMAGES, FINETUNE_DATA, FINETUNE_IMAGES   data in place of LLaVA's
#   TRAIN_ARGS       key=value for all trainings, such as "max_steps=10"
#   EVAL_ARGS        flags for all evaluations, such as "--limit 100"
#   REPORT_ARGS      flags for the report
#   JUDGE_MODEL, JUDGE_URL   what grades LLaVA-Bench, MM-Vet and answers about clips; their answers wait without it
#
# Nothing is downloaded: what is missing is named with its source before the first step. A step is done when
# OUTPUT/done has its very command and its result is there; remove that file to do it again. One that was cut off
# goes on from its last checkpoint or answer.

LLAVA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$LLAVA_ROOT"
if [[ -z "${VIRTUAL_ENV:-}" && ! -x "${CONDA_PREFIX:-}/bin/llava" && -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

export HF_HUB_OFFLINE=1 # models come from folders or the hub's copies that are here

OUTPUT="${OUTPUT:-outputs/reproduce/$PAPER}"
DATA="${DATA:-playground/data}"
PRETRAIN_DATA="${PRETRAIN_DATA:-$DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
PRETRAIN_IMAGES="${PRETRAIN_IMAGES:-$DATA/LLaVA-Pretrain/images}"
FINETUNE_IMAGES="${FINETUNE_IMAGES:-$DATA}"
declare -A VICUNA=([7b]="${VICUNA_7B:-lmsys/vicuna-7b-v1.5}" [13b]="${VICUNA_13B:-lmsys/vicuna-13b-v1.5}")
declare -A LLAVA=([7b]="${LLAVA_7B:-liuhaotian/llava-v1.5-7b}" [13b]="${LLAVA_13B:-liuhaotian/llava-v1.5-13b}")
read -ra train_args <<<"${TRAIN_ARGS:-}"
read -ra eval_args <<<"${EVAL_ARGS:-}"
read -ra report_args <<<"${REPORT_ARGS:-}"

fail() {
    echo "error: $1" >&2
    exit 2
}

# has LIST WORD: whether a list between commas or spaces has a word.
has() { [[ " ${1//,/ } " == *" $2 "* ]]; }

# check NAME ALLOWED: whether all words of a variable are allowed.
check() {
    local word
    for word in ${!1//,/ }; do
        has "$2" "$word" || fail "$1=${!1}: no $word; choose from $2"
    done
}

ROWS="${ROWS:-$MAIN_ROWS}"
ONLY="${ONLY:-pretrain,finetune,eval,report}"
check ROWS "$MAIN_ROWS ${MORE_ROWS:-} all"
check ONLY "pretrain finetune eval report"
if has "$ROWS" all; then ROWS="$MAIN_ROWS ${MORE_ROWS:-}"; fi
for flag in DRY_RUN PRETRAIN; do
    [[ "${!flag:-0}" =~ ^[01]$ ]] || fail "$flag=${!flag}: choose 1 or 0"
done
[[ "${NUM_GPUS:-1}" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS=$NUM_GPUS: expected a whole number from 1"

STEPS=""
RUNS=()
METHOD_NAMES=()
PRETRAINED=""

# step KIND ROW COMMAND...: one more step.
step() {
    local IFS=$'\t'
    STEPS+="$*"$'\n'
}

# train KIND ROW CONFIG MODEL [key=value...]: train into OUTPUT/checkpoints/ROW, or ROW-pretrain.
train() {
    local kind="$1" row="$2" config="$3" model="$4" folder="$OUTPUT/checkpoints/$2" data="${FINETUNE_DATA:-}"
    local images="$FINETUNE_IMAGES"
    shift 4
    if [[ "$kind" == pretrain ]]; then
        folder+="-pretrain" data="$PRETRAIN_DATA" images="$PRETRAIN_IMAGES"
    elif [[ -z "$data" ]]; then
        data="$DATA/llava_v1_5_mix665k.json"
        if [[ "$config" == *_next/* ]]; then data="$DATA/open-llava-next_instruct_mix1M.json"; fi
    fi
    step "$kind" "$row" llava train "$config" "model_name_or_path=$model" "data_path=$data" "image_folder=$images" \
        "output_dir=$folder" ${VISION_TOWER:+"vision_tower=$VISION_TOWER"} ${NUM_GPUS:+"num_gpus=$NUM_GPUS"} "$@" \
        ${train_args[@]+"${train_args[@]}"}
}

# finetune ROW SIZE CONFIG [key=value...]: finetune Vicuna from LLaVA-1.5's own projector, which is downloaded, or
# pretrained first.
finetune() {
    local row="$1" size="$2" config="$3" projector="${CHECKPOINTS:-checkpoints}/llava-v1.5-$2-pretrain/mm_projector.bin"
    shift 3
    has "$ROWS" "$row" || return 0
    if [[ "${PRETRAIN:-0}" == 1 ]]; then
        projector="$OUTPUT/checkpoints/$size-pretrain/mm_projector.bin"
        if ! has "$PRETRAINED" "$size"; then
            train pretrain "$size" configs/llava_v1_5/pretrain.yaml "${VICUNA[$size]}"
            PRETRAINED+=" $size"
        fi
    fi
    train finetune "$row" "$config" "${VICUNA[$size]}" "pretrain_mm_mlp_adapter=$projector" "$@"
}

# pretrain_and_finetune ROW FOLDER [key=value...]: both stages of a folder of configs/, on Vicuna 7B; the settings are
# those of both.
pretrain_and_finetune() {
    local row="$1" configs="configs/$2"
    shift 2
    has "$ROWS" "$row" || return 0
    train pretrain "$row" "$configs/pretrain.yaml" "${VICUNA[7b]}" "$@"
    train finetune "$row" "$configs/finetune.yaml" "${VICUNA[7b]}" \
        "pretrain_mm_mlp_adapter=$OUTPUT/checkpoints/$row-pretrain/mm_projector.bin" "$@"
}

# evaluate ROW CHECKPOINT TASKS [FLAG...]: answer and score into OUTPUT/eval/ROW.
evaluate() {
    local row="$1" checkpoint="$2" tasks="${TASKS:-$3}"
    shift 3
    has "$ROWS" "$row" || return 0
    step eval "$row" llava eval "$checkpoint" --task "$tasks" --output "$OUTPUT/eval/$row" --data "$DATA/eval" \
        ${VISION_TOWER:+--vision-tower "$VISION_TOWER"} ${NUM_GPUS:+--num-gpus "$NUM_GPUS"} \
        ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"} ${JUDGE_URL:+--judge-url "$JUDGE_URL"} "$@" \
        ${eval_args[@]+"${eval_args[@]}"}
    RUNS+=("$OUTPUT/eval/$row")
}

# trained ROW: where train and finetune put a checkpoint.
trained() { echo "$OUTPUT/checkpoints/$1"; }

# called ROW NAME: what the paper's tables call a row's method, where the checkpoint does not tell.
called() { if has "$ROWS" "$1"; then METHOD_NAMES+=(--method "$1=$2"); fi; }

# report_and_run: the report of all rows beside the paper, and among themselves; then show or run the steps.
report_and_run() {
    if ((${#RUNS[@]})); then
        step report paper llava report --paper "$PAPER" "${RUNS[@]}" ${METHOD_NAMES[@]+"${METHOD_NAMES[@]}"} \
            --output "$OUTPUT/report.md" ${report_args[@]+"${report_args[@]}"}
        step report runs llava report "${RUNS[@]}" --output "$OUTPUT/runs.md"
    fi
    local flags=(--marks "$OUTPUT/done" --device "${GPU:-A100}" --only "$ONLY")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then flags+=(--dry-run); fi
    exec python -m llava.reproduce "${flags[@]}" <<<"$STEPS" # in its place, so that signals reach the run
}
