"""Area `settings`: values of wrong types, out of range, unknown, contradicting or missing."""

from __future__ import annotations

from typing import Any

from llava.train.settings.parsing import flag_names
from tests.fuzz.case import KINDS_OF_RUN, Case, settings_of

# What no run can have.
REFUSED: list[tuple[str, Any]] = [
    *(("learning_rate", v) for v in (-1.0, "fast", ".nan", 0)),
    *(("per_device_train_batch_size", v) for v in (0, -1, 1.5, "two")),
    *(("gradient_accumulation_steps", v) for v in (0, -3, "x")),
    *(("save_steps", v) for v in (0, -5, "often")),
    *(("logging_steps", v) for v in (0, -1)),
    *(("max_steps", v) for v in ("many", 1.5, 0)),
    *(("num_train_epochs", v) for v in (0, -2, "all")),
    *(("model_max_length", v) for v in (0, -1, 4, "long")),
    *(("version", v) for v in ("v0", "vicuna9", 3)),
    *(("vision_tower", v) for v in ("./gone", "images", "data.json", 5)),
    *(("mm_vision_select_layer", v) for v in (99, -99, "last")),
    *(("mm_projector_type", v) for v in ("conv", "mlp0x_gelu", "mlpx_gelu")),
    *(("mm_vision_select_feature", v) for v in ("cls", 1)),
    *(("reduction", v) for v in ("prumergee", {"name": "prumerge", "ratio": 2}, {"name": "prumerge", "ratoi": 0.5})),
    *(("reduction", v) for v in ({"name": "pyramiddrop", "layers": [9], "ratios": [0.5]}, "{", [1], 7)),
    *(("warmup_ratio", v) for v in (2, -0.1, "short")),
    *(("lora_r", v) for v in (0, -4, "big")),
    *(("lora_dropout", v) for v in (1, -0.5, 7)),
    *(("weight_decay", v) for v in (-1.0, "some")),
    *(("max_grad_norm", v) for v in (-1.0, "x")),
    *(("optim", v) for v in ("adamm", 7)),
    *(("lr_scheduler_type", v) for v in ("cosin", 3)),
    *(("bits", v) for v in (3, "four")),
    *(("seed", v) for v in ("x", -1)),
    *(("data_path", v) for v in ("gone.json", "images", "", [], 5, "$HOME/x.json")),
    *(("image_folder", v) for v in ("gone", "data.json")),
    *(("image_aspect_ratio", v) for v in ("wide", 1)),
    *(("image_grid_pinpoints", v) for v in ("[(0, 1", "[(0, 0)]", 5)),
    *(("attn_implementation", v) for v in ("flash", "flash_attention_9")),
    *(("deepspeed", v) for v in ("gone.json", "data.json", "[]", "my_notes.txt")),
    *(("resume_from_checkpoint", v) for v in ("gone", "images")),
    *(("pretrain_mm_mlp_adapter", v) for v in ("gone.bin", "data.json", "images/red.png", "images")),
    *(("model_name_or_path", v) for v in ("./gone", "images", "clip", "")),
    *(("output_dir", v) for v in ("data.json", "", ["a", "b"], {"a": 1}, "data.json/out")),
    *(("num_gpus", v) for v in (0, -1, "x")),
    *(("hostfile", v) for v in ("gone", "data.json")),
    *(("on_bad_sample", v) for v in ("ignore", True)),
    *(("learning_rat", v) for v in (1e-3,)),
    *(("save_strategy", v) for v in ("sometimes", 3)),
    *(("global_batch_size", v) for v in (-2, 3)),
    *(("lora_weight_path", v) for v in ("gone", "images")),
    *(("dataloader_num_workers", v) for v in (-1, "x")),
]
JUNK: list[Any] = [
    None,
    "",
    " ",
    "é\n",
    "nan",
    "true",
    "../x",
    "$HOME",
    [],
    {},
    [1, 2],
    {"a": 1},
    -1,
    0,
    1,
    0.5,
    1e-300,
]
JUNK += [float("inf"), float("nan"), True, "none", "null"]
# What downloads, uploads, compiles or starts other programs is not for a fuzz.
UNSAFE = ("hub", "push", "compile", "fsdp", "torch", "accelerator", "debug", "profil", "local_rank", "max_steps")


def fuzz(case: Case) -> None:
    """One to three settings changed; the doctor and the training must agree."""
    kind = case.random.choice(KINDS_OF_RUN)
    changes: dict[str, Any] = {}
    expect = "either"
    if case.random.random() < 0.6:
        name, value = case.random.choice(REFUSED)
        changes[name], expect = value, "refused"
        if name in ("save_steps",):
            changes["save_strategy"] = "steps"
        if name == "num_train_epochs":
            changes["max_steps"] = -1
    else:
        usable = [name for name in flag_names() if not any(word in name for word in UNSAFE)]
        for name in case.random.sample(usable, case.random.choice((1, 1, 2))):
            changes[name] = case.random.choice(JUNK)
    if expect == "refused" and "lora" in next(iter(changes)):
        kind = "lora"
    case.say(f"{kind} {changes}")
    values = {**settings_of(kind, "out"), **changes}
    config = case.write_config(values)
    names = {*changes, *(str(value) for value in changes.values() if isinstance(value, str) and value.strip())}
    output = values["output_dir"] if isinstance(values["output_dir"], str) else "out"
    doctor = case.run(["doctor", config], names=names, expect=expect)
    outputs = [output] if output and not output.startswith((".", "$", "data.json")) else []
    code = case.run(
        ["train", config], outputs=outputs, names=names, expect=expect, check=case.check_run(output, kind, None)
    )
    if doctor == 0 and code not in (0, None):
        case.blame("the doctor finds nothing, and training refuses")
    if doctor in (1, 2) and code == 0:
        case.blame("the doctor finds a mistake, and training works")
