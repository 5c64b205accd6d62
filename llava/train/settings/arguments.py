"""LLaVA's flags as three dataclasses, and the checks that need one of them only.

What contradicts across them is checked in `llava.train.settings.parsing`, before any of them is built.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from llava.conversation import get_template
from llava.data.items import ON_BAD_SAMPLE
from llava.data.media.images import IMAGE_ACCESS
from llava.data.sources import is_url, parse_data_path
from llava.data.streaming import SHUFFLE_BUFFER
from llava.files import check_writable
from llava.mm_utils import ASPECT_RATIOS, parse_grid_pinpoints
from llava.model.image_layout import MERGE_TYPES
from llava.reduction import ReductionConfig
from llava.reduction.config import join_pyramiddrop_flags
from llava.train.launching.extension import prepare_extension
from llava.train.settings.problems import Problems
from llava.train.settings.values import check_numbers
from llava.yaml_text import read_yaml

logger = logging.getLogger(__name__)

# What installs an optional package: asking for the feature names the extra.
EXTRA_OF = {
    "av": "video",
    "bitsandbytes": "qlora",
    "deepspeed": "train",
    "flash_attn": "flash",
    "tensorboard": "train",
    "wandb": "train",
}
PROJECTOR_TYPE = re.compile(r"linear|identity|mlp[1-9]\d{0,2}x_gelu|tokenpacker")
FEATURE_DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = ("eager", "sdpa", "flash_attention_2")


def flag(default: Any, text: str) -> Any:
    """A dataclass field that is a flag with this default and help text."""
    return field(default=default, metadata={"help": text})


def require_package(module: str, wanted_by: str) -> None:
    """Raise a ValueError that names the extra to install where `module` is missing.

    Args:
        module: a key of `EXTRA_OF`.
        wanted_by: the flag and value that ask for it.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{wanted_by} needs the package {module}, which is not installed; "
            f'install it with: pip install "llava[{EXTRA_OF[module]}]"'
        )


def check_choice(flag: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`; None, "not given", passes."""
    if value is not None and value not in allowed:
        raise ValueError(f"--{flag} {value}: expected one of {', '.join(map(str, allowed))}")


def check_exists(flag: str, path: str | None) -> None:
    """Raise a ValueError where `path` is given and is neither a file nor a folder."""
    if path and not Path(path).expanduser().exists():
        raise ValueError(f"--{flag} {path}: no such file or folder (seen from {Path.cwd()})")


def check_model_path(flag: str, path: str | None) -> None:
    """As `check_exists`, but a name such as `owner/model` may also stand for a repository on a hub."""
    if path and (path[0] in "./~" or path.count("/") > 1):
        check_exists(flag, path)


def parse_pinpoints(value: str | list | None) -> list[list[int]] | None:
    """`--image_grid_pinpoints` as config.json has it, see `parse_grid_pinpoints`; None where it is not given."""
    if value is None:
        return None
    try:
        return [list(size) for size in parse_grid_pinpoints(value)]
    except ValueError as error:
        raise ValueError(f"--{error}") from error


@dataclass
class ModelArguments:
    """What is trained. What is not given comes from the checkpoint's config, otherwise it is LLaVA's default."""

    model_name_or_path: str | None = flag(
        None, "A language model, or a LLaVA checkpoint to go on from: folder or hub name."
    )
    version: str = flag("v1", "Prompt template, e.g. plain, v1, llava_llama_2, qwen.")
    freeze_backbone: bool = flag(False, "Do not train the language model.")
    tune_mm_mlp_adapter: bool = flag(False, "Train the projector only (pretraining).")
    vision_tower: str | None = flag(None, "CLIP or SigLIP: folder or hub name.")
    video_tower: str | None = flag(None, "A tower of its own for frames of clips, as in Video-LLaVA; default: none.")
    mm_vision_select_layer: int | None = flag(
        None, "Vision block whose output is used, counted as in hidden_states. Default -1."
    )
    mm_vision_select_feature: str | None = flag(None, "patch or cls_patch. Default patch.")
    pretrain_mm_mlp_adapter: str | None = flag(None, "mm_projector.bin to start from; none: the model's own.")
    mm_projector_type: str | None = flag(None, "linear, mlpNx_gelu, identity or tokenpacker. Default linear.")
    mm_use_im_start_end: bool | None = flag(None, "Put marker tokens around an image. Default False.")
    mm_use_im_patch_token: bool | None = flag(
        None, "Add LLaVA's patch token to the tokenizer. Default True, as in LLaVA."
    )
    mm_patch_merge_type: str | None = flag(
        None, "flat, spatial or spatial_unpad: how tiles become one sequence. Default flat."
    )
    unfreeze_mm_vision_tower: bool = flag(False, "Train the vision tower too.")
    reduction: str | None = flag(
        None, "Visual-token reduction: a method's name, JSON or YAML, or none. Default: the checkpoint's own."
    )
    layer_list: str | None = flag(None, "As PyramidDrop's release has it: drop after these layers, e.g. [8,16,24].")
    image_token_ratio_list: str | None = flag(
        None, "With --layer_list: the fractions of image tokens left then, e.g. [0.5,0.25,0.125]."
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if not self.model_name_or_path:
            problems.add("--model_name_or_path is missing: name a language model or a LLaVA checkpoint")
        problems.check(check_model_path, "model_name_or_path", self.model_name_or_path)
        problems.check(check_model_path, "vision_tower", self.vision_tower)
        problems.check(check_model_path, "video_tower", self.video_tower)
        problems.check(check_exists, "pretrain_mm_mlp_adapter", self.pretrain_mm_mlp_adapter)
        problems.check(check_choice, "mm_vision_select_feature", self.mm_vision_select_feature, ("patch", "cls_patch"))
        problems.check(check_choice, "mm_patch_merge_type", self.mm_patch_merge_type, MERGE_TYPES)
        if self.mm_projector_type is not None and not PROJECTOR_TYPE.fullmatch(self.mm_projector_type):
            problems.add(
                f"--mm_projector_type {self.mm_projector_type}: expected linear, mlpNx_gelu, identity or tokenpacker"
            )
        problems.check(self._check_version)
        problems.check(self._read_reduction)
        problems.raise_all()

    def _check_version(self) -> None:
        try:
            get_template(self.version)
        except ValueError as error:
            raise ValueError(f"--version: {error}") from error

    def _read_reduction(self) -> None:
        self.reduction = join_pyramiddrop_flags(self.reduction, self.layer_list, self.image_token_ratio_list)
        if isinstance(self.reduction, ReductionConfig):  # as one flag would have said it
            self.reduction = json.dumps(self.reduction.to_dict())
            self.layer_list = self.image_token_ratio_list = None
        ReductionConfig.parse(self.reduction)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str | None = flag(
        None,
        "LLaVA's conversations as JSON, JSON lines or Parquet: a file, folder, glob, hub dataset or URL; several with "
        "commas, or as JSON or YAML with weights: [{path: a.json, weight: 0.5, image_folder: images}].",
    )
    streaming: bool = flag(False, "Read the data while training, converting nothing; needs max_steps.")
    shuffle_buffer_size: int = flag(
        SHUFFLE_BUFFER, "With --streaming: samples among which the next one is drawn, in each worker."
    )
    on_bad_sample: str = flag(
        "stop", "What a sample does that cannot be trained on: stop, or skip (written to OUTPUT_DIR/rejects.jsonl)."
    )
    lazy_preprocess: bool = flag(True, "Kept for LLaVA's commands; samples are always read when their turn comes.")
    is_multimodal: bool = flag(True, "Kept for LLaVA's commands; found out by itself.")
    image_folder: str | None = flag(None, "Folder that the JSON's image paths start from.")
    image_access: str = flag(
        IMAGE_ACCESS[0],
        "Where image names may lead: folder (below image_folder), disk (any file of this machine), remote (URLs too).",
    )
    video_folder: str | None = flag(None, "Folder that the JSON's video paths start from. Default: image_folder.")
    num_frames: int | None = flag(None, "Frames of a clip, evenly. Default: the checkpoint's, otherwise 8.")
    video_fps: float | None = flag(None, "Frames a second of a clip, in place of num_frames.")
    max_frames: int | None = flag(None, "Frames of a clip at most.")
    image_aspect_ratio: str | None = flag(None, "square, pad or anyres. Default: the checkpoint's, otherwise square.")
    image_grid_pinpoints: str | None = flag(
        None, "anyres: (width, height) pairs in pixels that an image may be fitted to."
    )
    feature_cache: str | None = flag(
        None, "Folder of what the frozen vision tower made of the images (llava cache-features), read in place of them."
    )
    feature_cache_dtype: str = flag("bfloat16", "Type of the features there: bfloat16, float16 or float32.")

    def __post_init__(self) -> None:
        problems = Problems()
        if not self.data_path:
            problems.add("--data_path is missing: name a JSON file of conversations in LLaVA's format")
        else:
            problems.check(parse_data_path, self.data_path)
        if not is_url(self.image_folder or ""):
            problems.check(check_exists, "image_folder", self.image_folder)
        if not is_url(self.video_folder or ""):
            problems.check(check_exists, "video_folder", self.video_folder)
        problems.check(check_choice, "image_access", self.image_access, IMAGE_ACCESS)
        problems.check(check_choice, "on_bad_sample", self.on_bad_sample, ON_BAD_SAMPLE)
        check_numbers(vars(self), problems)
        problems.check(check_choice, "feature_cache_dtype", self.feature_cache_dtype, FEATURE_DTYPES)
        problems.check(check_choice, "image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        problems.check(parse_pinpoints, self.image_grid_pinpoints)
        problems.raise_all()


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' arguments with LLaVA's additions and defaults."""

    if TYPE_CHECKING:  # inherited
        accelerator_config: Any
        activation_checkpointing: bool | None
        activation_checkpointing_kwargs: Any
        deepspeed: Any
        dataloader_pin_memory: bool
        gradient_checkpointing: bool | None
        gradient_checkpointing_kwargs: Any
        tf32: bool | None
        use_cpu: bool
        warmup_steps: float

    cache_dir: str | None = flag(None, "Where models from the hub are kept.")
    optim: str = flag("adamw_torch", "Optimizer, one of transformers' names.")
    remove_unused_columns: bool = flag(False, "Leave it False: the collator decides.")
    # None stands first because HfArgumentParser takes the type after it.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "none, wandb, tensorboard, ...; or several, a,b."}
    )
    warmup_ratio: float = flag(0.0, "Part of all steps in which the rate rises.")
    freeze_mm_mlp_adapter: bool = flag(False, "Do not train the projector.")
    mpt_attn_impl: str | None = flag(None, "For LLaVA's MPT models, not supported here.")
    attn_implementation: str | None = flag(
        None, "eager, sdpa or flash_attention_2. Default: the fastest that is installed."
    )
    model_max_length: int = flag(512, "Longest sequence in tokens, images included.")
    double_quant: bool = flag(True, "QLoRA: quantize the quantization constants too.")
    quant_type: str = flag("nf4", "QLoRA: nf4 or fp4.")
    bits: int = flag(16, "Bits of the frozen language model's weights: 16, 8 or 4.")
    lora_enable: bool = flag(False, "Train LoRA adapters instead of the language model.")
    lora_r: int = flag(64, "LoRA: rank.")
    lora_alpha: int = flag(16, "LoRA: scale; the adapter is weighted alpha / r.")
    lora_dropout: float = flag(0.05, "LoRA: dropout probability.")
    lora_weight_path: str = flag("", "LoRA: folder of an adapter to go on from.")
    lora_bias: str = flag("none", "LoRA: biases to train: none, all or lora_only.")
    mm_projector_lr: float | None = flag(None, "Learning rate of the projector.")
    mm_vision_tower_lr: float | None = flag(None, "Learning rate of the vision tower.")
    preflight_seconds: float = flag(
        60.0, "Before training, look for image files for so long, and check shapes and disk; 0 checks nothing."
    )
    group_by_modality_length: bool = flag(False, "Batches of one modality and similar length.")
    global_batch_size: int = flag(
        0, "Samples of one step on all devices: gradient_accumulation_steps is derived from it. 0: it is not fixed."
    )
    resume_changed: str | None = flag(
        None, "Settings, a,b, in which the run may differ from that of the checkpoint it goes on from."
    )
    logging_nan_inf_filter: bool = flag(False, "Hide NaN and infinite losses in the log.")
    stop_after_nonfinite_steps: int = flag(
        3, "Stop when the loss was NaN or infinite in so many steps in a row, seen when a line is logged; 0: never."
    )
    packing: bool | None = flag(
        None,
        "Run a batch as one row without padding, in which the samples do not see each other. Default: auto, where that "
        "is faster.",
    )
    tokens_per_batch: int = flag(
        0,
        "Fill a micro-batch with samples up to so many tokens, visual ones included, in place of a number of samples. "
        "0: per_device_train_batch_size counts.",
    )
    image_tokens_estimate: int = flag(
        0, "With --tokens_per_batch and an adaptive method: tokens that an image is expected to keep. 0: all."
    )

    def __post_init__(self) -> None:
        if isinstance(self.report_to, list):
            self.report_to = ",".join(self.report_to)
        check_training(self)
        self.report_to = split_names(self.report_to or "none")
        if self.global_batch_size:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size, self.per_device_train_batch_size, processes
            )
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_steps or self.warmup_ratio
        self._rename_checkpointing()
        if self.tf32 and not is_torch_tf32_available():
            logger.info("--tf32 True is ignored: this machine has no GPU that knows TF32")
            self.tf32 = None
        if runs_on_cpu(self):
            if self.fp16:
                raise ValueError("--fp16 True needs a GPU, and this run has none: use --bf16 True, or neither")
            self._prepare_cpu()
        if self.accelerator_config is None:  # the next batch is copied while the device computes
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        super().__post_init__()
        self._keep_to_one_gpu()

    def _rename_checkpointing(self) -> None:
        # An alias that newer transformers warn about: use the new name where there is one.
        names = {f.name for f in dataclasses.fields(self)}
        if "activation_checkpointing" in names and self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing_kwargs = None

    def _keep_to_one_gpu(self) -> None:
        # Where one process sees several GPUs, transformers wraps the model in nn.DataParallel, which would cut the
        # lists of pictures at places of its own.
        self.idle_gpus = max(0, self.n_gpu - 1)
        self._n_gpu = min(1, self.n_gpu)

    def _prepare_cpu(self) -> None:
        # transformers takes bf16 on the CPU only with use_cpu; and with use_cpu accelerate starts torch's
        # process group but not DeepSpeed's, so that ZeRO-3 would count one process. DeepSpeed's is started
        # first: accelerate finds it and uses it.
        self.use_cpu = True
        self.dataloader_pin_memory = False
        if self.deepspeed:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            set_single_process_env()
            import deepspeed

            prepare_extension()
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def accumulation_steps(global_batch_size: int, per_device: int, processes: int) -> int:
    """How many micro-batches make one step.

    Args:
        global_batch_size: samples of a step.
        per_device: samples of a micro-batch on one device.
        processes: devices.

    Raises:
        ValueError: no whole number of micro-batches makes that step; sizes that do are named.
    """
    if global_batch_size > 0 and global_batch_size % (per_device * processes) == 0:
        return global_batch_size // (per_device * processes)
    share = global_batch_size // processes
    fitting = [n for n in range(1, per_device + 1) if global_batch_size % (n * processes) == 0]
    advice = (
        f"with --per_device_train_batch_size {fitting[-1]} it is" if fitting else f"choose a multiple of {processes}"
    )
    raise ValueError(
        f"--global_batch_size {global_batch_size} is no multiple of {processes} devices x "
        f"--per_device_train_batch_size {per_device} (a device's share is {share}); {advice}"
    )


def check_training(args: Any) -> None:
    """Raise a ValueError that names a setting of `TrainingArguments` which no run can have.

    Args:
        args: the settings as attributes, as given on the command line.
    """
    problems = Problems()
    if args.output_dir:
        problems.check(check_writable, args.output_dir, "--output_dir")
    else:
        problems.add("--output_dir is missing: name a folder for checkpoints and results")
    if args.mpt_attn_impl is not None:
        problems.add("--mpt_attn_impl belongs to LLaVA's MPT models, which are not supported; leave it out")
    problems.check(check_choice, "optim", args.optim, tuple(name.value for name in OptimizerNames))
    problems.check(check_choice, "bits", args.bits, (4, 8, 16))
    problems.check(check_choice, "quant_type", args.quant_type, ("nf4", "fp4"))
    problems.check(check_choice, "lora_bias", args.lora_bias, ("none", "all", "lora_only"))
    for tracker in problems.check(split_names, args.report_to or "none") or ():
        problems.check(check_choice, "report_to", tracker, ("none", "all", *sorted(INTEGRATION_TO_CALLBACK)))
    problems.check(check_choice, "attn_implementation", args.attn_implementation, ATTENTION)
    problems.check(check_exists, "lora_weight_path", args.lora_weight_path)
    if isinstance(args.fsdp_config, str) and not args.fsdp_config.lstrip().startswith("{"):
        problems.check(check_exists, "fsdp_config", args.fsdp_config)
    check_numbers(vars(args), problems)
    problems.check(check_scheduler, args)
    if args.fp16 and args.use_cpu:
        problems.add("--fp16 True needs a GPU, and --use_cpu True uses none: use --bf16 True, or neither")
    problems.raise_all()


def check_scheduler(args: Any) -> None:
    """Raise a ValueError where transformers has no learning-rate schedule of this name with these options."""
    kwargs = args.lr_scheduler_kwargs or {}
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        transformers.get_scheduler(
            str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=kwargs,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--lr_scheduler_type {args.lr_scheduler_type} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}"
        ) from error


def runs_on_cpu(args: transformers.TrainingArguments) -> bool:
    """True where the run uses no GPU: it has none, or the user said so."""
    chosen = args.use_cpu or os.environ.get("DS_ACCELERATOR") == "cpu"
    return chosen or not torch.accelerator.is_available()


def set_single_process_env() -> None:
    """Where no launcher did, say to torch.distributed that this process is the only one."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")


def read_deepspeed_config(deepspeed: str | dict) -> dict[str, Any]:
    """A DeepSpeed configuration.

    Args:
        deepspeed: path of a JSON file, JSON text, or its content.

    Raises:
        ValueError: the file is missing or no JSON object.
    """
    config: Any = deepspeed
    if isinstance(deepspeed, str):
        text = deepspeed
        if not text.lstrip().startswith("{"):
            check_exists("deepspeed", deepspeed)
            try:
                text = Path(deepspeed).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--deepspeed {deepspeed}: no JSON file: {error}") from error
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed {deepspeed}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {deepspeed}: expected a JSON object, got {type(config).__name__}")
    return config


def zero_stage(deepspeed: str | dict | None) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for; 0 without one."""
    zero = read_deepspeed_config(deepspeed).get("zero_optimization", {}) if deepspeed else {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ValueError(f'--deepspeed {deepspeed}: "zero_optimization" needs a "stage" from 0 to 3')
    return int(stage)


def split_names(text: str) -> list[str]:
    """Names separated by commas, or a JSON list of them."""
    names = read_yaml(text) if text.startswith("[") else text.split(",")
    return [str(name).strip() for name in names]
