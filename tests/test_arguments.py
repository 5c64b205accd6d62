"""Flags, YAML and the shell scripts: the same settings by all three ways, and clear errors before anything heavy."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llava.train.settings import arguments as arguments_module
from llava.train.settings.arguments import accumulation_steps
from llava.train.settings.config import load_config, own_flags
from llava.train.settings.legacy import LEGACY_FLAGS, translate_legacy
from llava.train.settings.parsing import check_args, flag_names, parse_args, resolved, to_flags
from llava.train.train import write_run_config
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world, run_command

CONFIGS = {
    "pretrain": "llava_v1_5/pretrain.yaml",
    "finetune": "llava_v1_5/finetune.yaml",
    "finetune_lora": "llava_v1_5/finetune_lora.yaml",
}

VERSIONS = {"_next": "v1_6", "_video": "video", "video_llava": "video"}  # a recipe's scripts, by its folder's ending


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


ASKED_OF_PYTHON = "prumerge"  # the one recipe for which the scripts start Python, as for all in earnest


def script_flags(script: str, folder: Path, extra: list[str], **environment: str) -> list[str]:
    """What a shell script hands to the launcher: the launcher is replaced by a program that writes it down.

    Starting Python takes seconds, so that a recipe's own flags, which a script asks it for, are at hand already.
    """
    written = folder / "argv.json"
    fake = folder / "bin" / "deepspeed"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(written)!r}, 'w'))\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    method, stage = environment.get("METHOD", ""), Path(script).stem
    recipe = ROOT / "configs" / f"{method}{'_next' if 'v1_6' in script else ''}" / f"{stage}.yaml"
    if method not in ("", ASKED_OF_PYTHON) and recipe.is_file():
        answer = folder / "recipe.txt"
        answer.write_text("".join(f"{flag}\n" for flag in own_flags(str(recipe))))
        python = fake.with_name("python")
        known = f'"$1 $2 $3" = "-m llava.train.settings.config {recipe}"'
        python.write_text(f'#!/bin/sh\nif [ {known} ]; then cat {answer}; else exec {sys.executable} "$@"; fi\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(fake.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    result = run_command(["bash", script, *extra], PATH=path, VIRTUAL_ENV=sys.prefix, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(written.read_text())


def recipes() -> list[Any]:
    """Every recipe that has a script: (script, METHOD, YAML file)."""
    found = []
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        folder = file.parent.name
        version = next((scripts for ending, scripts in VERSIONS.items() if folder.endswith(ending)), "v1_5")
        script = ROOT / "scripts" / version / f"{file.stem}.sh"
        if script.is_file() and not folder.endswith("_13b"):
            method = "" if "llava" in folder else folder.removesuffix("_next").removesuffix("_video")
            found.append(pytest.param(str(script), method, file, id=f"{folder}-{file.stem}"))
    return found


@pytest.mark.parametrize(("script", "method", "file"), recipes())
def test_script_and_yaml_give_the_same_run(
    script: str, method: str, file: Path, world: TinyWorld, tmp_path: Path
) -> None:
    adapter = tmp_path / "mm_projector.bin"
    torch.save({}, adapter)
    paths = {"MODEL": world.llm, "VISION_TOWER": world.clip, "DATA_PATH": world.data}
    paths |= {"IMAGE_FOLDER": world.images, "PRETRAIN_MM_MLP_ADAPTER": adapter}
    if "video" in file.parent.name:
        paths |= {"VIDEO_TOWER": world.clip, "VIDEO_FOLDER": world.images}
    environment = {name: str(path) for name, path in paths.items()}
    environment |= {"NUM_GPUS": "2", "METHOD": method}
    if method != ASKED_OF_PYTHON:
        environment["DS_ACCELERATOR"] = "cpu"  # known, so that torch is not asked
    argv = script_flags(script, tmp_path, ["--max_steps", "7", "--seed=3"], **environment)
    entry = ["--num_gpus", "2", str(ROOT / "llava/train/train_mem.py")]
    assert argv[:5] == ["--log_level", "critical", *entry]
    names = {"MODEL": "model_name_or_path"}
    overrides = [f"{names.get(k, k.lower())}={v}" for k, v in environment.items() if k in paths]
    if file.stem == "pretrain":
        overrides = [text for text in overrides if not text.startswith("pretrain_mm")]
    flags, options = load_config(file, [*overrides, "max_steps=7", "seed=3", "num_gpus=2"])
    assert options.num_gpus == 2
    by_script, by_yaml = (settings_without_deepspeed(f) for f in (argv[5:], flags))
    assert by_script == by_yaml
    assert bool(by_yaml["reduction"]) == bool(method)
    config = re.compile(r"--deepspeed[= ]\S*(zero\d\.json)")
    assert config.findall(" ".join(argv))[-1] == config.search(" ".join(flags)).group(1)  # type: ignore[union-attr]


def test_scripts_for_tasks_and_qlora(world: TinyWorld, tmp_path: Path) -> None:
    """What differs from finetune.sh and finetune_lora.sh is what differs between LLaVA's scripts of these names."""
    adapter = tmp_path / "mm_projector.bin"
    torch.save({}, adapter)
    paths = {"MODEL": world.llm, "VISION_TOWER": world.clip, "DATA_PATH": world.data, "IMAGE_FOLDER": world.images}
    environment = {name: str(path) for name, path in paths.items()} | {"PRETRAIN_MM_MLP_ADAPTER": str(adapter)}

    def flags(script: str, *more: str) -> list[str]:
        extra = ["--output_dir", "out", *more]
        return script_flags(f"scripts/{script}.sh", tmp_path, extra, NUM_GPUS="1", **environment)

    def settings(script: str) -> dict[str, Any]:
        return settings_without_deepspeed(flags(script)[5:])

    def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in one.items() if value != other[name]}

    full, lora = settings("v1_5/finetune"), settings("v1_5/finetune_lora")
    no_adapter = {"pretrain_mm_mlp_adapter": None}
    assert difference(settings("v1_5/finetune_task"), full) == no_adapter
    assert difference(settings("v1_5/finetune_task_lora"), lora) == no_adapter
    wanted = {"lora_r": 64, "lora_alpha": 16, "mm_projector_lr": None, "learning_rate": 2e-5}
    argv = flags("finetune_qlora", "--bits", "16")  # parsed without bitsandbytes
    assert argv[argv.index("--bits") + 1] == "4"
    assert difference(settings_without_deepspeed(argv[5:]), lora) == wanted


def test_trims_flag_names_its_method(world: TinyWorld, tmp_path: Path) -> None:
    for value, ratio in (("TRIM:0.5", 0.5), ("TextSim+:-1", None)):
        flags = world.flags(tmp_path, mm_vision_token_reduce_func=value)
        reduction = json.loads(parse_args(flags).model.reduction or "")
        assert reduction == {"name": "trim", "ratio": ratio, "text": "conversation"}
    with pytest.raises(ValueError, match="unknown reduction method 'pca'"):
        parse_args(world.flags(tmp_path, mm_vision_token_reduce_func="PCA:0.99"))


def test_what_the_caller_says_comes_before_the_recipe(world: TinyWorld, tmp_path: Path) -> None:
    environment = {"METHOD": "trim", "OUTPUT_DIR": "mine", "REDUCTION": "{name: trim, ratio: 0.05}"}
    argv = script_flags("scripts/v1_5/finetune.sh", tmp_path, ["--output_dir", "last"], **environment)
    outputs = [argv[i + 1] for i, word in enumerate(argv) if word == "--output_dir"]
    assert outputs[-2:] == ["mine", "last"]
    reductions = [argv[i + 1] for i, word in enumerate(argv) if word == "--reduction"]
    assert reductions == ["{name: trim, ratio: 0.05}"]
    assert any(word.startswith("--reduction=") and "conversation" in word for word in argv)
    without_recipe = script_flags("scripts/v1_5/finetune.sh", tmp_path, [], METHOD="random")
    assert without_recipe[-2:] == ["--reduction", "random"]
    # A folder of its own: the baseline's checkpoints are not gone on from, and not overwritten.
    assert "./checkpoints/llava-v1.5-7b-random" in without_recipe
    assert "./checkpoints/llava-v1.5-7b-fastv" in script_flags(
        "scripts/v1_5/finetune.sh", tmp_path, [], REDUCTION="fastv"
    )


@pytest.mark.parametrize(
    ("batch", "per_device", "processes", "steps"), [(128, 16, 8, 1), (128, 16, 2, 4), (128, 2, 64, 1), (6, 3, 1, 2)]
)
def test_the_global_batch_stays_the_same(batch: int, per_device: int, processes: int, steps: int) -> None:
    assert accumulation_steps(batch, per_device, processes) == steps


@pytest.mark.parametrize(
    ("batch", "per_device", "processes", "advice"),
    [
        (128, 16, 16, "with --per_device_train_batch_size 8 it is"),
        (128, 16, 6, "choose a multiple of 6"),
        (128, 3, 8, "with --per_device_train_batch_size 2 it is"),
        (-1, 2, 2, "is no multiple"),
    ],
)
def test_a_global_batch_that_the_devices_cannot_share(batch: int, per_device: int, processes: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        accumulation_steps(batch, per_device, processes)


def test_the_global_batch_of_a_run(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_args(world.flags(tmp_path, global_batch_size=8)).training.gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match="derives --gradient_accumulation_steps"):
        parse_args(world.flags(tmp_path, global_batch_size=8, gradient_accumulation_steps=2))


def settings_without_deepspeed(flags: list[str]) -> dict[str, Any]:
    """All resolved settings; without DeepSpeed, which starts a process group."""
    words = shlex.split(" ".join(shlex.quote(flag) for flag in flags))
    if "--deepspeed" in words:
        index = words.index("--deepspeed")
        del words[index : index + 2]
    return resolved(parse_args([word for word in words if not word.startswith("--deepspeed=")]))


def test_the_published_hyperparameters() -> None:
    """LLaVA-1.5: https://github.com/haotian-liu/LLaVA#train."""
    flags = {
        stage: dict(f[2:].split("=", 1) for f in load_config(ROOT / "configs" / p)[0]) for stage, p in CONFIGS.items()
    }
    common = {"warmup_ratio": "0.03", "lr_scheduler_type": "cosine", "weight_decay": "0.0", "num_train_epochs": "1"}
    for values in flags.values():
        assert common.items() <= values.items()
        assert values["model_max_length"] == "2048"
    rates = {stage: float(values["learning_rate"]) for stage, values in flags.items()}
    assert rates == {"pretrain": 1e-3, "finetune": 2e-5, "finetune_lora": 2e-4}
    batches = {stage: int(values["global_batch_size"]) for stage, values in flags.items()}
    assert batches == {"pretrain": 256, "finetune": 128, "finetune_lora": 128}
    assert batches == {stage: 8 * int(values["per_device_train_batch_size"]) for stage, values in flags.items()}
    lora = flags["finetune_lora"]
    assert (lora["lora_r"], lora["lora_alpha"], float(lora["mm_projector_lr"])) == ("128", "256", 2e-5)


def test_llavas_own_command_works_unchanged(world: TinyWorld, tmp_path: Path) -> None:
    """The flags of LLaVA's scripts/v1_5/pretrain.sh, with these paths."""
    command = f"""--model_name_or_path {world.llm} --version plain --data_path {world.data}
    --image_folder {world.images} --vision_tower {world.clip} --mm_projector_type mlp2x_gelu
    --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --bf16 True --output_dir {tmp_path} --num_train_epochs 1
    --per_device_train_batch_size 32 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 24000 --save_total_limit 1
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1
    --tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --report_to none"""
    parsed = parse_args(command.split())
    assert parsed.model.mm_vision_select_layer == -2
    training = parsed.training
    assert training.bf16
    assert training.gradient_checkpointing
    assert training.get_warmup_steps(1000) == 30
    assert training.eval_strategy == "no"
    assert training.report_to == []


def test_defaults_are_llavas(world: TinyWorld, tmp_path: Path) -> None:
    given = ["--model_name_or_path", world.llm, "--data_path", world.data, "--output_dir", tmp_path, "--version", "v1"]
    training = parse_args(list(map(str, given))).training
    assert (training.optim, training.model_max_length, training.remove_unused_columns) == ("adamw_torch", 512, False)
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.bits) == (64, 16, 0.05, 16)
    assert training.report_to == []


WRONG = {
    "unknown flag": ({"lora_enble": True}, r"unknown flag: '--lora_enble.*did you mean lora_enable"),
    "unknown template": ({"version": "v9"}, r"unknown conversation template 'v9'; known: .*vicuna_v1"),
    "unknown optimizer": ({"optim": "adamx"}, r"--optim adamx: expected one of .*adamw_torch"),
    "unknown reducer": ({"reduction": "prunmerge"}, r"prunmerge.*prumerge"),
    "unknown reducer's option": ({"reduction": '{"name": "prumerge", "rato": 1}'}, r"no option 'rato'"),
    "one flag of pyramiddrop": ({"layer_list": "[8]"}, r"--layer_list and --image_token_ratio_list go together"),
    "pyramiddrop's lists": ({"layer_list": "[8]", "image_token_ratio_list": "[0.5,0.2]"}, r"lists of one length"),
    "pyramiddrop's code": (
        {"layer_list": "__import__('os').getcwd()", "image_token_ratio_list": "[0.5]"},
        r"must be a list",
    ),
    "two decoder methods": (
        {"layer_list": "[8]", "image_token_ratio_list": "[0.5]", "reduction": "fastv"},
        r"leave one out",
    ),
    "bits without lora": ({"bits": 4}, r"--bits 4 or 8 .*--lora_enable"),
    "bits": ({"bits": 5}, r"--bits 5: expected one of 4, 8, 16"),
    "bits with zero3": ({"bits": 4, "lora_enable": True, "deepspeed": "scripts/zero3.json"}, r"ZeRO-3"),
    "two kinds of run": ({"tune_mm_mlp_adapter": True, "lora_enable": True}, r"--tune_mm_mlp_adapter.*--lora_enable"),
    "trained and frozen": ({"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, r"freeze_mm_mlp_adapter"),
    "tower in pretraining": (
        {"tune_mm_mlp_adapter": True, "unfreeze_mm_vision_tower": True},
        r"--unfreeze_mm_vision_tower",
    ),
    "adapter without lora": ({"lora_weight_path": "."}, r"--lora_weight_path has no effect"),
    "rate of a frozen tower": ({"mm_vision_tower_lr": 1e-6}, r"--mm_vision_tower_lr has no effect"),
    "rate of a frozen projector": ({"mm_projector_lr": 1, "freeze_mm_mlp_adapter": True}, r"--mm_projector_lr has no"),
    "both half types": ({"bf16": True, "fp16": True}, r"--fp16 and --bf16"),
    "two orders": (
        {"group_by_modality_length": True, "train_sampling_strategy": "sequential"},
        r"--group_by_modality_length and --train_sampling_strategy",
    ),
    "mpt": ({"mpt_attn_impl": "triton"}, r"--mpt_attn_impl belongs to LLaVA's MPT models"),
    "no number": ({"learning_rate": "fast"}, r"learning_rate.*invalid float value: 'fast'"),
    "rank": ({"lora_r": 0}, r"--lora_r 0"),
    "aspect ratio": ({"image_aspect_ratio": "wide"}, r"--image_aspect_ratio wide: expected one of square, pad, anyres"),
    "pinpoints": ({"image_grid_pinpoints": "336x672"}, r"--image_grid_pinpoints 336x672: expected pairs"),
    "no data": ({"data_path": None}, r"--data_path is missing"),
    "no model": ({"model_name_or_path": None}, r"--model_name_or_path is missing"),
    "no output": ({"output_dir": None}, r"--output_dir is missing"),
    "data file": ({"data_path": "nowhere.json"}, r"nowhere\.json.*does not exist"),
    "image folder": ({"image_folder": "nowhere"}, r"--image_folder nowhere: no such file"),
    "image access": ({"image_access": "all"}, r"--image_access all: expected one of folder, disk, remote"),
    "model folder": ({"model_name_or_path": "./nowhere"}, r"--model_name_or_path ./nowhere: no such file"),
    "adapter": ({"pretrain_mm_mlp_adapter": "nowhere.bin"}, r"--pretrain_mm_mlp_adapter nowhere\.bin: no such file"),
    "zero": ({"deepspeed": "nowhere.json"}, r"--deepspeed nowhere\.json: no such file"),
    "zero's json": ({"deepspeed": "scripts/launch.sh"}, r"--deepspeed scripts/launch\.sh: not valid JSON"),
    "tracker": ({"report_to": "wandbb"}, r"--report_to wandbb"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("parse", [parse_args, check_args])
def test_wrong_settings_are_refused(
    parse: Any, settings: dict[str, Any], message: str, world: TinyWorld, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(arguments_module.EXTRA_OF, "bitsandbytes", "qlora")
    with pytest.raises(ValueError, match=message):
        parse(world.flags(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "missing", "extra"),
    [
        ({"bits": 4, "lora_enable": True}, "bitsandbytes", "qlora"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attn", "flash"),
        ({"report_to": "wandb"}, "wandb", "train"),
        ({"report_to": "none,tensorboard"}, "tensorboard", "train"),
        ({"deepspeed": str(ROOT / "scripts/zero2.json")}, "deepspeed", "train"),
    ],
)
def test_a_missing_package_names_its_extra(
    settings: dict[str, Any], missing: str, extra: str, world: TinyWorld, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(arguments_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'{missing}.*pip install "llava\[{extra}\]"'):
        check_args(world.flags(tmp_path, **settings))


def test_a_setting_without_effect_warns(world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero2, offload = (str(ROOT / f"scripts/{name}.json") for name in ("zero2", "zero3_offload"))
    check_args(world.flags(tmp_path, deepspeed=zero2))
    check_args(world.flags(tmp_path, deepspeed=offload, max_grad_norm=0.5))
    assert not caplog.text
    check_args(world.flags(tmp_path, deepspeed=zero2, max_grad_norm=0.5))
    assert "--max_grad_norm 0.5 has no effect" in caplog.text


def test_legacy_flags_are_translated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    optimizer = ["--optim", "adamw_hf", "a", "b"]
    argv = ["--evaluation_strategy", "no", "--no-cuda", "--group_by_length", "True", "--adafactor=False", *optimizer]
    known = flag_names()
    assert translate_legacy(argv, known) == [
        "--eval_strategy=no",
        "--use_cpu",
        "--train_sampling_strategy=group_by_length",
        *optimizer,
    ]
    assert translate_legacy(["--optim", "adamw_hf"], known) == ["--optim=adamw_torch"]
    assert translate_legacy(["--save_safetensors", "True", "--bf16"], known) == ["--bf16"]
    assert "--evaluation_strategy no is --eval_strategy no today" in caplog.text
    assert "--save_safetensors is ignored: weights are always written as safetensors" in caplog.text


def test_legacy_flags_point_at_flags_that_exist() -> None:
    known = flag_names()
    assert {legacy.flag for legacy in LEGACY_FLAGS.values() if legacy.flag} <= set(known)
    assert (
        translate_legacy(["--evaluation_strategy", "no"], [*known, "evaluation_strategy"])[0] == "--evaluation_strategy"
    )


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_extends_relative_to_its_file(tmp_path: Path) -> None:
    write(tmp_path / "base" / "a.yaml", "learning_rate: 1.0e-3\nbf16: true\nlora_r: 8\n")
    child = write(tmp_path / "run" / "b.yaml", "extends: ../base/a.yaml\nlora_r: 16\nmm_projector_lr: 1.0\n")
    flags, _ = load_config(child, ["mm_projector_lr=null", "weight_decay=0.1"])
    assert flags == ["--learning_rate=0.001", "--bf16=True", "--lora_r=16", "--weight_decay=0.1"]


def test_yaml_reduction_merges_options_but_not_methods(tmp_path: Path) -> None:
    base = write(tmp_path / "a.yaml", "reduction:\n  encoder: {name: prumerge, ratio: 0.5}\n")
    flags, _ = load_config(base, ["reduction.encoder.ratio=0.25", "reduction.encoder.neighbours=8"])
    chosen = {"name": "prumerge", "ratio": 0.25, "neighbours": 8}
    assert flags == [f"--reduction={json.dumps({'encoder': chosen})}"]
    flags, _ = load_config(base, ["reduction={encoder: {name: prumerge}}"])
    assert flags == [f"--reduction={json.dumps({'encoder': {'name': 'prumerge', 'ratio': 0.5}})}"]
    assert load_config(base, ["reduction=prumerge"])[0] == ["--reduction=prumerge"]
    assert load_config(base, ["reduction=none"])[0] == ["--reduction=none"]
    assert load_config(base, ["reduction=null"])[0] == []


def test_pyramiddrops_own_flags_are_a_reduction(world: TinyWorld, tmp_path: Path) -> None:
    flags = {"layer_list": "[8,16,24]", "image_token_ratio_list": "[0.5,0.25,0.125]"}
    decoder = {"name": "pyramiddrop", "layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125]}
    alone = parse_args(world.flags(tmp_path, **flags)).model
    assert json.loads(alone.reduction or "") == {"decoder": decoder}
    joined = parse_args(world.flags(tmp_path, **flags, reduction="prumerge")).model
    assert json.loads(joined.reduction or "") == {"encoder": {"name": "prumerge"}, "decoder": decoder}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("lernin_rate: 1", [], r"a\.yaml: unknown key: 'lernin_rate' \(did you mean learning_rate"),
        ("bf16: true", ["bf61=true"], r"unknown key: 'bf61' \(did you mean bf16"),
        ("bf16: true", ["bf16"], r"'bf16': expected key=value"),
        ("extends: b.yaml", [], r"b\.yaml: no such file, named by `extends` in .*a\.yaml"),
        ("extends: a.yaml", [], r"a\.yaml: extends itself: .*a\.yaml -> .*a\.yaml"),
        ("bf16: [", [], r"a\.yaml: "),
        ("- 1", [], r"a\.yaml: expected settings"),
        ("reduction: nosuch", [], r"nosuch"),
        ("num_gpus: 0", [], r"num_gpus=0: expected a whole number 1 or more"),
    ],
)
def test_wrong_yaml_is_refused(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path / "a.yaml", text), overrides)


def test_every_recipe_is_readable() -> None:
    recipes = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        load_config(recipe)


def test_the_runs_own_record_gives_the_same_run(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"reduction": "prumerge", "lora_enable": True, "bf16": True, "report_to": "none"}
    settings |= {
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": '{"num_cycles": 0.5}',
        "image_grid_pinpoints": "[(32, 64)]",
    }
    parsed = parse_args(world.flags(tmp_path, **settings))
    write_run_config(parsed)
    flags, _ = load_config(tmp_path / "train_config.yaml")
    assert resolved(parse_args(flags)) == resolved(parsed)
    record = yaml.safe_load((tmp_path / "train_config.yaml").read_text())
    assert "weight_decay" not in record  # defaults are left out


def test_flags_survive_the_way_through_a_command_line() -> None:
    assert to_flags({"bf16": True, "lora_r": 4, "cache_dir": None}) == ["--bf16=True", "--lora_r=4"]
