#!/usr/bin/env bash
# Sourced by the training scripts: finds the environment and the devices, and defines LAUNCHER, the command
# that starts one process for each device.
#
#   NUM_GPUS      processes on this machine (default: one for each GPU; one on a machine without)
#   HOSTFILE      DeepSpeed's list of machines, for more than one
#   MASTER_PORT   port at which the processes meet, where another run uses 29500

LLAVA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${VIRTUAL_ENV:-}" && ! -x "${CONDA_PREFIX:-}/bin/deepspeed" && -f "$LLAVA_ROOT/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "$LLAVA_ROOT/.venv/bin/activate"
fi
if ! command -v deepspeed >/dev/null; then
    echo "deepspeed is not installed here: run  bash $LLAVA_ROOT/scripts/setup_env.sh" >&2
    exit 1
fi
if [[ "${DS_ACCELERATOR:-}" == cpu ]] ||
    ! python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
    export DS_ACCELERATOR=cpu
    NUM_GPUS="${NUM_GPUS:-1}"
    threads=$(($(getconf _NPROCESSORS_ONLN) / NUM_GPUS))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
fi

# supervise.py lets the run write a checkpoint on SIGTERM, SIGUSR1 and Ctrl-C; its exit code is then 75.
LAUNCHER=(python "$LLAVA_ROOT/llava/train/supervise.py" deepspeed)
if [[ -n "${NUM_GPUS:-}" ]]; then LAUNCHER+=(--num_gpus "$NUM_GPUS"); fi
if [[ -n "${HOSTFILE:-}" ]]; then LAUNCHER+=(--hostfile "$HOSTFILE"); fi
if [[ -n "${MASTER_PORT:-}" ]]; then LAUNCHER+=(--master_port "$MASTER_PORT"); fi

# A method of visual-token reduction: a name, or JSON such as {"encoder": {"name": "prumerge", "ratio": 0.25}}.
REDUCTION="${REDUCTION:-${METHOD:-}}"
REDUCTION_FLAG=(--reduction "$REDUCTION")
if [[ -z "$REDUCTION" ]]; then REDUCTION_FLAG=(); fi
