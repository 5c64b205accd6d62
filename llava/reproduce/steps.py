"""A step of a reproduction: a command of `llava`, resolved to what it reads, makes and costs before anything runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from llava.cli import app
from llava.cost import Scenario, gpu_hours, open_model, question_cost
from llava.cost.question import methods, weights_with
from llava.cost.sizes import Sizes, reduction_of
from llava.eval.judge import Judge
from llava.eval.reports.published import load_paper
from llava.eval.tasks import get_task
from llava.files import ADAPTER_CONFIG, PROJECTOR_FILE
from llava.model.weights import read_json
from llava.reduction.config import ReductionConfig
from llava.reproduce.downloads import (
    EVALUATION,
    FRAMES,
    HUB,
    MODELS,
    PRESETS,
    PROJECTORS,
    QUESTIONS,
    TILED,
    TRAINING,
    Download,
    TrainingData,
)
from llava.train.settings.config import load_config
from llava.train.settings.parsing import Arguments, check_args

KINDS = ("pretrain", "finetune", "eval", "report")
UTILIZATION = 0.3
"""Part of a device's peak that training and answering are planned with."""
LATER = ("data_path", "image_folder", "pretrain_mm_mlp_adapter")
"""Paths of a training run that are looked for when the steps start, not when they are planned."""
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""UsageError of click, or of newer typers' own copy of it."""
ANSWER_TOKENS = 10
BATCH = 8


@dataclass(frozen=True)
class Model:
    """A model of the plan.

    Attributes:
        sizes: what the cost model opens: a name, or the content of a config.json.
        reduction: its own method, as `ReductionConfig.parse` reads it.
    """

    sizes: Any
    reduction: Any = None

    @property
    def is_preset(self) -> bool:
        """Whether the cost model knows it by name."""
        return self.sizes in (*PRESETS.values(), *TILED.values())

    @property
    def towers(self) -> list[str]:
        """Names of the towers for pictures and frames, where the cost model knows them."""
        config = open_model(self.sizes).config if self.is_preset else None
        names = (getattr(config, key, None) for key in ("mm_vision_tower", "mm_video_tower"))
        return [name for name in names if name]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with what it needs.

    Attributes:
        kind: one of `KINDS`.
        row: of the paper's table.
        words: the command.
        reads: files, folders and models, each with its download; one without comes from an earlier step.
        makes: the file that is there when it is done.
        disk: GB that it writes.
        hours: of one device.
        model: what it trains.
        check: raises a ValueError where it could not run, though its files are there.
    """

    kind: str
    row: str
    words: list[str]
    reads: Mapping[str, Download | None]
    makes: Path
    disk: float = 0.0
    hours: float = 0.0
    model: Model | None = field(default=None, repr=False)
    check: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def name(self) -> str:
        """Of this step alone."""
        return f"{self.kind}-{self.row}"

    @property
    def command(self) -> str:
        """As a shell reads it."""
        return shlex.join(self.words)


def parse_command(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The subcommand and its values, as the program itself parses them.

    Raises:
        ValueError: it is no command of `llava`, or its flags are wrong.
    """
    group: Any = typer.main.get_command(app)
    if len(words) < 2 or words[0] != "llava" or words[1] not in group.commands:
        raise ValueError(f"{shlex.join(words)}: expected a command of llava")
    try:
        context = group.commands[words[1]].make_context(f"llava {words[1]}", list(words[2:]))
    except USAGE_ERROR as error:
        raise ValueError(f"{shlex.join(words)}: {error.format_message()}") from error
    return words[1], context.params


def resolve(kind: str, row: str, words: list[str], made: Mapping[str, Model], device: str) -> Step:
    """A step with what it needs.

    Args:
        kind: one of `KINDS`.
        row: of the paper's table.
        words: the command.
        made: models of earlier steps, by their folder.
        device: that hours are counted for.

    Raises:
        ValueError: the command, a setting, a task, a method or a paper is wrong.
    """
    name, values = parse_command(words)
    resolver = {"train": _resolve_training, "eval": _resolve_evaluation, "report": _resolve_report}
    if name not in resolver:
        raise ValueError(f"{shlex.join(words)}: a step trains, evaluates or reports")
    about = resolver[name](values, made, device)
    return Step(kind=kind, row=row, words=words, **about)


# Training ---------------------------------------------------------------------------------------------------------


def _resolve_training(values: dict[str, Any], made: Mapping[str, Model], device: str) -> dict[str, Any]:
    flags, _ = load_config(values["config"], values["overrides"])
    arguments, later = _checked(flags, values["config"])
    model, training = arguments.model, arguments.training
    data, folder, projector = (later.get(name) for name in LATER)
    if data is None:
        raise ValueError(f"{values['config']}: a step that trains names data_path")
    known = TRAINING.get(Path(data).name)
    reads: dict[str, Download | None] = {
        str(model.model_name_or_path): _model(str(model.model_name_or_path)),
        str(model.vision_tower): _model(str(model.vision_tower)),
        data: known.file if known else None,
        **_image_folders(folder, known),
    }
    if projector:
        reads[projector] = PROJECTORS.get(Path(projector).parent.name)
    trains = "lora" if training.lora_enable else "projector" if model.tune_mm_mlp_adapter else "all"
    opened = _model_to_train(arguments)
    hours = _training_hours(known, arguments, opened, trains, device)
    output = Path(training.output_dir)
    last = {"lora": ADAPTER_CONFIG, "projector": PROJECTOR_FILE, "all": "config.json"}[trains]
    disk = _result_size(opened, trains, training.lora_r)
    return {"reads": reads, "makes": output / last, "disk": disk, "hours": hours, "model": opened}


def _checked(flags: list[str], stand_in: Path) -> tuple[Arguments, dict[str, str]]:
    """The checked settings, and apart from them the paths that may not be there yet; `stand_in` is a file that is."""
    pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    later = {name: pairs.pop(name) for name in LATER if name in pairs}
    if "data_path" in later:
        pairs["data_path"] = str(stand_in)
    return check_args([f"--{name}={value}" for name, value in pairs.items()]), later


def _model(name: str) -> Download | None:
    """Of a model on the hub; None for a folder."""
    return None if name.count("/") != 1 or name[0] in "./~" else Download(f"{HUB}/{name}", MODELS.get(name))


def _image_folders(folder: str | None, data: TrainingData | None) -> dict[str, Download | None]:
    if not folder:
        return {}
    if data is None:
        return {folder: None}
    return {str(Path(folder) / name): download for name, download in data.images.items()}


def _model_to_train(arguments: Arguments) -> Model:
    """The model that a run makes, for the cost model; without a known size where its language model is not here."""
    name, own = str(arguments.model.model_name_or_path), arguments.model.reduction
    if name in PRESETS:
        preset = PRESETS[name]
        return Model(TILED.get(preset, preset) if arguments.data.image_aspect_ratio == "anyres" else preset, own)
    file = Path(name) / "config.json"
    if not file.is_file():
        return Model(None, own)
    raw = read_json(file)
    settings = ("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type")
    vision = {key: value for key in settings if (value := getattr(arguments.model, key)) is not None}
    data = {"image_aspect_ratio": arguments.data.image_aspect_ratio}
    return Model({"mm_vision_tower": arguments.model.vision_tower, **raw, **vision, **data}, own)


def _training_hours(data: TrainingData | None, arguments: Arguments, model: Model, trains: str, device: str) -> float:
    if data is None or model.sizes is None:
        return 0.0
    return gpu_hours(
        data.samples,
        model.reduction,
        model=model.sizes,
        text_tokens=data.text_tokens,
        trains=trains,
        trains_tower=arguments.model.unfreeze_mm_vision_tower,
        device=device,
        utilization=UTILIZATION,
        epochs=arguments.training.num_train_epochs,
    )


def _result_size(model: Model, trains: str, rank: int) -> float:
    """GB of what a run leaves, two bytes a weight."""
    if model.sizes is None:
        return 0.0
    opened = open_model(model.sizes)
    sizes = Sizes.of(opened).with_training(trains, rank, False)
    weights = weights_with(opened, sizes, methods(model.reduction)[0])
    adapters = sum(layer.weights for layers in sizes.layers for layer in layers if layer.trained)
    parts = {
        "projector": weights["projector"],
        "lora": weights["projector"] + adapters,
        "all": sum(weights.values()),
    }
    return 2 * parts[trains] / 1e9


# Evaluation -------------------------------------------------------------------------------------------------------


def _resolve_evaluation(values: dict[str, Any], made: Mapping[str, Model], device: str) -> dict[str, Any]:
    if not values["task"] or values["output"] is None:
        raise ValueError("a step that evaluates names --task and --output")
    names = [name.strip() for name in values["task"].split(",") if name.strip()]
    tasks = [get_task(name) for name in names]
    if values["judge_model"]:
        Judge(model=values["judge_model"], url=values["judge_url"], cache=values["output"] / ".verdicts")
    path, base = values["model_path"], values["model_base"]
    model = made.get(path) or _opened(path)
    towers = [values["vision_tower"], *model.towers[1:]] if values["vision_tower"] else model.towers
    models = [name for name in (path, base, *towers) if name is not None]
    reads: dict[str, Download | None] = {name: None if name in made else _model(name) for name in models}
    for task in tasks:
        for need in task.needs:
            place = str(values["data"] / task.folder / need.path)
            reads[place] = Download(need.source, EVALUATION.get(need.path))
    asked = model.reduction if values["reduction"] is None else values["reduction"]
    hours = 0.0
    if model.sizes is not None:
        for images in {FRAMES.get(name, 1) for name in names}:
            alike = [name for name in names if FRAMES.get(name, 1) == images]
            count = sum(min(QUESTIONS.get(name, 0), values["limit"] or 10**9) for name in alike)
            hours += count * _seconds(model.sizes, asked, device, images) / 3600

    def check() -> None:
        for task in tasks:
            task.check_files(values["data"])

    return {"reads": reads, "makes": values["output"] / names[-1] / "result.json", "hours": hours, "check": check}


def _opened(path: str) -> Model:
    """A checkpoint that is here or has a known name; without sizes otherwise."""
    if path in PRESETS:
        return Model(PRESETS[path])
    if (Path(path) / "config.json").is_file():
        return Model(path, reduction_of(path) or None)
    return Model(None)


def _seconds(sizes: Any, reduction: Any, device: str, images: int) -> float:
    """The time of a question about so many images or frames, in a batch, at the planned part of the device's peak."""
    scenario = Scenario(batch=BATCH, images=images, new_tokens=ANSWER_TOKENS, device=device)
    cost = question_cost(open_model(sizes), ReductionConfig.parse(reduction).to_dict() or None, scenario)
    return sum(cost.seconds().values()) / BATCH / UTILIZATION


# Report -----------------------------------------------------------------------------------------------------------


def _resolve_report(values: dict[str, Any], made: Mapping[str, Model], device: str) -> dict[str, Any]:
    if values["output"] is None:
        raise ValueError("a step that reports names --output")
    if values["paper"] is not None:
        load_paper(values["paper"])
    return {"reads": {str(run): None for run in values["runs"] or ()}, "makes": values["output"]}
