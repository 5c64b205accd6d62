# Sourced by the scripts that train on the toy world: MODEL, VISION_TOWER, NUM_GPUS and the flags that all stages share.

export MODEL=playground/toy/models/vicuna
export VISION_TOWER=playground/toy/models/clip
# The toy's pictures are not square; its models need neither 16-bit types nor checkpointing.
flags=(--image_aspect_ratio pad --gradient_checkpointing False --dataloader_num_workers 0 --save_strategy no
    --per_device_train_batch_size 16 --global_batch_size 0)
if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR=cpu
    cores="$(getconf _NPROCESSORS_ONLN)"
    export NUM_GPUS="${NUM_GPUS:-$((cores > 1 ? 2 : 1))}"
    flags+=(--bf16 False) # CPUs without bfloat16 units would be slow
fi
export NUM_GPUS="${NUM_GPUS:-1}"
