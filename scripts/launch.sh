#!/usr/bin/env bash
# Sourced by the training scripts: finds the environment and the devices, and defines LAUNCHER, the command
# that starts one process for each device, and the flags that the scripts share.
#
#   NUM_GPUS      processes on this machine (default: one for each GPU; one on a machine without)
#   HOSTFILE      DeepSpeed's list of machines, for more than one
#   MASTER_PORT   port at which the processes meet, where another run uses 29500
#   METHOD        a folder of configs/ (prumerge, trim, stf, ...): its recipe for this stage
#   REDUCTION     a method's name, or JSON such as {"encoder": {"name": "prumerge", "ratio": 0.25}}

LLAVA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${VIRTUAL_ENV:-}" && ! -x "${CONDA_PREFIX:-}/bin/deepspeed" && -f "$LLAVA_ROOT/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "$LLAVA_ROOT/.venv/bin/activate"
fi
if ! command -v deepspeed >/dev/null; then
    echo "deepspeed is not installed here: run  bash $LLAVA_ROOT/scripts/setup_env.sh" >&2
    exit 1
fi
# With a hostfile this machine may be one without GPUs, from which others are started.
if [[ "${DS_ACCELERATOR:-}" == cpu ]] || { [[ -z "${HOSTFILE:-}" ]] &&
    ! python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; }; then
    export DS_ACCELERATOR=cpu
    if [[ -z "${HOSTFILE:-}" ]]; then NUM_GPUS="${NUM_GPUS:-1}"; fi
    threads=$(($(getconf _NPROCESSORS_ONLN) / ${NUM_GPUS:-1}))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
fi

# supervise.py lets the run write a checkpoint on SIGTERM, SIGUSR1 and Ctrl-C; its exit code is then 75.
# DeepSpeed's launcher would repeat the whole command three times, and once more after an error.
LAUNCHER=(python "$LLAVA_ROOT/llava/train/launching/supervise.py" deepspeed --log_level critical)
if [[ -n "${NUM_GPUS:-}" ]]; then LAUNCHER+=(--num_gpus "$NUM_GPUS"); fi
if [[ -n "${HOSTFILE:-}" ]]; then LAUNCHER+=(--hostfile "$HOSTFILE"); fi
if [[ -n "${MASTER_PORT:-}" ]]; then LAUNCHER+=(--master_port "$MASTER_PORT"); fi

# What all stages of LLaVA-1.5 and LLaVA-NeXT have in common, as configs/llava_v1_5/base.yaml; each script states the
# rest. Of a flag given twice the last counts.
COMMON_FLAGS=(
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}"
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
    --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2
    --mm_use_im_start_end False
    --mm_use_im_patch_token False
    --num_train_epochs 1
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type cosine
    --bf16 True
    --tf32 True
    --gradient_checkpointing True
    --per_device_eval_batch_size 4
    --dataloader_num_workers 4
    --lazy_preprocess True
    --eval_strategy no
    --save_strategy steps
    --save_total_limit 1
    --logging_steps 1
    --report_to none
)

# What the caller's variables say, as flags. They come after the script's own flags and those of METHOD.
GIVEN_FLAGS=()
for pair in MODEL:model_name_or_path VISION_TOWER:vision_tower DATA_PATH:data_path IMAGE_FOLDER:image_folder \
    PRETRAIN_MM_MLP_ADAPTER:pretrain_mm_mlp_adapter OUTPUT_DIR:output_dir DEEPSPEED_CONFIG:deepspeed \
    REDUCTION:reduction VIDEO_TOWER:video_tower VIDEO_FOLDER:video_folder; do
    variable="${pair%%:*}"
    if [[ -n "${!variable:-}" && "${SCRIPT_IGNORES:-}" != *"$variable"* ]]; then
        GIVEN_FLAGS+=("--${pair#*:}" "${!variable}")
    fi
done

if [[ -n "${HOSTFILE:-}" && ! -f "$HOSTFILE" ]]; then
    echo "HOSTFILE=$HOSTFILE: no such file; DeepSpeed would train on this machine alone" >&2
    exit 2
fi
# REDUCTION may give options of METHOD, or add methods to it, but not ask for another one.
if [[ -n "${METHOD:-}" && -n "${REDUCTION:-}" && ! "$REDUCTION" =~ (^|[^a-z_])"$METHOD"([^a-z_]|$) ]]; then
    echo "METHOD=$METHOD and REDUCTION=$REDUCTION ask for different methods: leave one out" >&2
    exit 2
fi

# METHOD names a folder of configs/ with a file for this stage, whose own settings replace the script's; a method
# without such a recipe is taken as it is, on the script's settings. RECIPES is the ending of such folders for scripts
# of another model than LLaVA-1.5.
METHOD_FLAGS=()
OUTPUT_SUFFIX="" # keeps a run with a method apart from the baseline's folder
if [[ -n "${REDUCTION:-}" && "${REDUCTION}" != none ]]; then
    OUTPUT_SUFFIX="-reduced"
    if [[ "$REDUCTION" =~ ^[a-z_]+$ ]]; then OUTPUT_SUFFIX="-$REDUCTION"; fi
fi
if [[ -n "${METHOD:-}" ]]; then
    recipe="$LLAVA_ROOT/configs/$METHOD${RECIPES:-}/$(basename "$0" .sh).yaml"
    if [[ -f "$recipe" ]]; then
        flags="$(python -m llava.train.settings.config "$recipe")"
        while IFS= read -r flag; do METHOD_FLAGS+=("$flag"); done <<<"$flags"
    else
        echo "no $recipe: --reduction $METHOD on this script's own settings" >&2
        METHOD_FLAGS=(--reduction "$METHOD")
        OUTPUT_SUFFIX="-$METHOD"
    fi
fi
