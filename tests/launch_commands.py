"""Training commands of LLaVA's forks, word for word but for line breaks: data for the test that runs them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_world import ROOT, TinyWorld


@dataclass(frozen=True)
class LaunchCommand:
    """A command line as it stands in a repository.

    Attributes:
        origin: repository and script.
        text: the command, variables filled in as that script sets them.
        method: what the repository's code does to all runs, and its command does not say; here a flag says it.
        reduction: what the result's config.json says then.
    """

    origin: str
    text: str
    reduction: dict[str, Any]
    method: str | None = None

    @property
    def entry(self) -> str:
        """The program that is launched."""
        return next(word for word in shlex.split(self.text) if word.endswith(".py"))

    def shell(self, world: TinyWorld, output: Path, projector: Path | None) -> str:
        """The command for a shell, with `flags`."""
        words = shlex.split(self.text)
        launcher = words[: words.index(self.entry) + 1]
        return shlex.join([*launcher, *self.flags(world, output, projector)])

    def flags(self, world: TinyWorld, output: Path, projector: Path | None) -> list[str]:
        """The flags, with paths of this machine in place of the repository's, for two steps; the last word counts."""
        words = shlex.split(self.text)
        words = words[words.index(self.entry) + 1 :]
        paths: dict[str, Path | str | None] = {
            "--model_name_or_path": world.llm,
            "--vision_tower": world.clip,
            "--image_tower": world.clip,
            "--video_tower": world.clip,
            "--video_folder": world.images,
            "--data_path": world.captions if "--tune_mm_mlp_adapter" in words else world.data,
            "--image_folder": world.images,
            "--pretrain_mm_mlp_adapter": projector,
            "--output_dir": output,
        }
        for flag, path in paths.items():
            if flag in words and path is not None:
                at = words.index(flag) + 1
                end = next(i for i in range(at, len(words)) if words[i].startswith("--"))
                words[at:end] = [str(path)] * (end - at)
        at = words.index("--deepspeed") + 1
        words[at] = str(ROOT / words[at])
        words += ["--reduction", self.method] if self.method else []
        return [*words, "--max_steps", "2"]


PRUMERGE = LaunchCommand(
    "42Shawn/LLaVA-PruMerge, scripts/v1_5/finetune_lora.sh",
    """
deepspeed --include localhost:0,1,2,3,4,5 llava/train/train_mem.py
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
    --image_folder ./playground/data --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True
    --output_dir ./checkpoints/llava-v1.5-13b-lora --num_train_epochs 1 --per_device_train_batch_size 8
    --per_device_eval_batch_size 8 --gradient_accumulation_steps 4 --evaluation_strategy "no"
    --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-4 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
""",
    {"encoder": {"name": "prumerge"}},
    method="prumerge",  # its clip_encoder.py
)

TRIM = LaunchCommand(
    "FreedomIntelligence/TRIM, scripts/finetune_8gpu_TRIM.sh",
    """
deepspeed llava/train/train_mem.py
    --deepspeed ./scripts/zero3.json --model_name_or_path ./model/vicuna-7b-v1.5 --version v1 --data_path ""
    --image_folder "" --image_aspect_ratio pad --group_by_modality_length True
    --vision_tower clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter /path/to/llava-vicuna-7b-v1.5-pretrain/mm_projector.bin --mm_vision_select_layer -2
    --mm_vision_token_reduce_func TextSim+:-1 --mm_use_im_start_end False --mm_use_im_patch_token False
    --mm_projector_type mlp2x_gelu --bf16 True
    --output_dir ./checkpoints/finetuned/llava-vicuna-7b-v1.5-TextSim+_T-1 --num_train_epochs 1
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 5000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
""",
    {"encoder": {"name": "trim", "ratio": None, "text": "conversation"}},
)

STF_PRETRAIN = LaunchCommand(
    "visresearch/LLaVA-STF, scripts/v1_5/pretrain.sh",
    """
deepspeed llava/train/train_mem.py
    --deepspeed ./scripts/zero2.json --model_name_or_path liuhaotian/llava-v1.5-13b --version plain
    --data_path ./data/blip_laion_cc_sbu_558k.json --image_folder ./data
    --vision_tower openai/clip-vit-large-patch14-336 --output_dir ./checkpoints/llava-v1.5-vicuna-13b
    --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
    --evaluation_strategy "no" --save_strategy "epoch" --save_steps 24000 --save_total_limit 1
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1
    --tf32 True --model_max_length 4096 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --report_to tensorboard
""",
    {"projector": {"name": "stf"}},
    method="stf",  # its builder.py of the projector
)

STF_FINETUNE = LaunchCommand(
    "visresearch/LLaVA-STF, scripts/v1_5/finetune.sh",
    """
deepspeed llava/train/train_mem.py
    --deepspeed ./scripts/zero3.json --model_name_or_path liuhaotian/llava-v1.5-13b --version v1
    --data_path ./data/llava_v1_5_mix665k.json --image_folder ./data
    --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-vicuna-13b-pretrain/mm_projector.bin
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True
    --output_dir ./checkpoints/llava-v1.5-vicuna-13b --num_train_epochs 1 --per_device_train_batch_size 2
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 --evaluation_strategy "no"
    --save_strategy "epoch" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True --model_max_length 4096
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to tensorboard
""",
    {"projector": {"name": "stf"}},  # as the projector says
)

PYRAMIDDROP = LaunchCommand(
    "Cooperx521/PyramidDrop, scripts/v1_5/pdrop_train/finetune.sh",
    """
deepspeed llava/train/train_mem_pdrop.py
    --deepspeed ./scripts/zero3.json --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
    --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True
    --output_dir ./checkpoints/llava-v1.5-13b --num_train_epochs 1 --per_device_train_batch_size 16
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy "no"
    --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --layer_list [8,16,24]
    --image_token_ratio_list [0.5,0.25,0.125] --report_to wandb
""",
    {"decoder": {"name": "pyramiddrop", "layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125]}},
)

VIDEO_LLAVA_PRETRAIN = LaunchCommand(
    "PKU-YuanGroup/Video-LLaVA, scripts/v1_5/pretrain.sh",
    """
deepspeed videollava/train/train_mem.py
    --deepspeed ./scripts/zero2.json --model_name_or_path lmsys/vicuna-7b-v1.5 --version v1
    --data_path llava_all_image_video/pt_json/llava_image_.json llava_all_image_video/pt_json/valley_.json
    --image_folder llava_all_image_video --image_tower LanguageBind/LanguageBind_Image
    --video_folder llava_all_image_video --video_tower LanguageBind/LanguageBind_Video_merge
    --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir ./checkpoints/videollava-7b-pretrain --num_train_epochs 1 --per_device_train_batch_size 32
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy "no"
    --save_strategy "steps" --save_steps 24000 --save_total_limit 1 --learning_rate 1e-3 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048  --tokenizer_model_max_length 3072 --gradient_checkpointing True
    --dataloader_num_workers 8 --lazy_preprocess True --report_to tensorboard --cache_dir "./cache_dir"
""",
    {},
)

VIDEO_LLAVA_FINETUNE = LaunchCommand(
    "PKU-YuanGroup/Video-LLaVA, scripts/v1_5/finetune.sh",
    """
deepspeed videollava/train/train_mem.py
    --deepspeed ./scripts/zero2_offload.json --model_name_or_path lmsys/vicuna-7b-v1.5 --version v1
    --data_path llava_all_image_video/ft_json/llava_image_tune_.json
    llava_all_image_video/ft_json/videochatgpt_tune_.json llava_all_image_video/ft_json/nlp_tune.json
    --image_folder llava_all_image_video --image_tower LanguageBind/LanguageBind_Image
    --video_folder llava_all_image_video --video_tower LanguageBind/LanguageBind_Video_merge
    --mm_projector_type mlp2x_gelu --pretrain_mm_mlp_adapter ./checkpoints/videollava-7b-pretrain/mm_projector.bin
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --image_aspect_ratio pad --group_by_modality_length True --bf16 True
    --output_dir ./checkpoints/videollava-7b --num_train_epochs 1 --per_device_train_batch_size 16
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy "no"
    --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048  --tokenizer_model_max_length 3072 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to tensorboard --cache_dir "./cache_dir"
""",
    {},
)

VIDEO_LLAVA_LORA = LaunchCommand(
    "PKU-YuanGroup/Video-LLaVA, scripts/v1_5/finetune_lora.sh",
    VIDEO_LLAVA_FINETUNE.text.replace(
        "train_mem.py\n",
        "train_mem.py\n    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5\n",
    )
    .replace("checkpoints/videollava-7b ", "checkpoints/videollava-7b-lora ")
    .replace("--learning_rate 2e-5", "--learning_rate 2e-4"),
    {},
)
