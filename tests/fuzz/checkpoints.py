"""Area `checkpoints`: files of a model that are missing, torn, mistyped, of other shapes, or not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.case import BASES, KINDS_OF_RUN, Case, settings_of

FOLDERS = (
    "llm",
    "clip",
    "runs/full",
    "runs/lora",
    "runs/projector",
    "hf",
    "runs/full/checkpoint-2",
    "runs/lora/checkpoint-2",
)
# Without these a folder is as good, or says less.
DISPENSABLE = ("generation_config.json", "train_config.yaml", "run_info.json", "metrics.jsonl", "my_notes.txt")
DISPENSABLE += ("special_tokens_map.json", "chat_template", "README.md", "trainer_state.json", "training_args.bin")


def fuzz(case: Case) -> None:
    """One file of one folder is changed; then a command that reads it."""
    folder = case.random.choice(FOLDERS)
    files = [p for p in sorted((case.folder / folder).iterdir()) if p.is_file() and not p.name.startswith(DISPENSABLE)]
    path = case.random.choice(files)
    change = _change(case, path)
    case.say(f"{folder}/{path.name}: {change}")
    names = {path.name, path.stem, folder, Path(folder).name}
    # Of CLIP's weights some are not read: the text tower, the last block.
    expect = "refused" if change == "NaN" and folder not in ("hf", "clip") else "either"
    for command in case.random.sample([_train, _eval, _convert, _merge], 2):
        command(case, folder, names, expect)


def _change(case: Case, path: Path) -> str:
    """Change a file; what was done, in words."""
    weights = path.suffix in (".safetensors", ".bin") and path.stat().st_size > 0
    ways = ["deleted", "emptied", "cut", "a folder"]
    ways += ["NaN", "NaN", "shape", "lost", "integers", "extra"] if weights else []
    ways += ["type", "type", "lost key", "not an object", "text"] if path.suffix == ".json" else []
    way = case.random.choice(ways)
    if way in ("deleted", "a folder"):
        path.unlink()
        path.mkdir() if way == "a folder" else None
    elif way in ("emptied", "cut"):
        content = path.read_bytes()
        path.write_bytes(content[: 0 if way == "emptied" else case.random.randrange(1, max(2, len(content) - 1))])
    elif weights:
        return way + _change_weights(case, path, way)
    else:
        return way + _change_json(case, path, way)
    return way


def _change_weights(case: Case, path: Path, way: str) -> str:
    safe = path.suffix == ".safetensors"
    loaded: Any = load_file(path) if safe else torch.load(path, weights_only=False)
    floats = (
        [n for n, w in loaded.items() if isinstance(w, torch.Tensor) and w.is_floating_point() and w.ndim]
        if isinstance(loaded, dict)
        else []
    )
    if not floats:
        path.write_bytes(path.read_bytes()[:10])
        return " (cut)"
    name = case.random.choice(floats)
    if way == "NaN":
        loaded[name].view(-1)[case.random.randrange(loaded[name].numel())] = float("nan")
        way = ""
    elif way == "shape":
        loaded[name] = torch.cat([loaded[name], loaded[name]])
    elif way == "lost":
        del loaded[name]
    elif way == "integers":
        loaded[name] = loaded[name].to(torch.int32)
    else:
        loaded["surprise.weight"] = torch.zeros(3)
    save_file(loaded, path, metadata={"format": "pt"}) if safe else torch.save(loaded, path)
    return "" if way == "" else f" of {name}"


def _change_json(case: Case, path: Path, way: str) -> str:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = {}
    if way == "text" or not isinstance(content, dict) or not content:
        path.write_text("hello {")
        return ""
    if way == "not an object":
        path.write_text("[1, 2]")
        return ""
    key = case.random.choice(sorted(content))
    if way == "lost key":
        del content[key]
    else:
        content[key] = case.random.choice([None, -1, 0, "x", [], {}, 10**9, True, [1, "a"]])
    path.write_text(json.dumps(content))
    return f" {key}" + (f" = {content[key]!r}" if key in content else "")


def _train(case: Case, folder: str, names: set[str], expect: str) -> None:
    kind = folder.split("/")[1] if folder.startswith("runs/") else case.random.choice(KINDS_OF_RUN)
    changes: dict[str, Any] = {}
    if "checkpoint-" in folder:
        changes["resume_from_checkpoint"] = folder
    elif folder == "runs/full":
        changes["model_name_or_path"] = folder
    elif folder == "runs/lora":
        changes["lora_weight_path"] = folder
    elif folder == "runs/projector":
        changes["pretrain_mm_mlp_adapter"] = f"{folder}/mm_projector.bin"
    elif folder == "hf":
        return
    reads = {"llm": "runs/projector", "clip": "clip"}.get(folder, folder)
    config = case.write_config(settings_of(kind, "out", **changes))
    expect = expect if folder != "runs/projector" or "mm_projector.bin" in names else "either"
    case.say(f"{kind} {changes}, reads {reads}")
    case.run(["doctor", config], names=names)
    case.run(["train", config], outputs=["out"], names=names, expect=expect, check=case.check_run("out", kind, None))


def _source(case: Case, folder: str) -> tuple[str, str | None]:
    """A model that reads the folder, and its base."""
    if folder in ("llm", "clip"):
        return case.random.choice([("runs/lora", "llm"), ("runs/projector", "llm")])
    kind = folder.split("/")[1] if folder.startswith("runs/") else None
    return folder, BASES[kind] if kind else None


def _eval(case: Case, folder: str, names: set[str], expect: str) -> None:
    source, base = _source(case, folder)
    arguments = ["eval", source, "--question-file", "questions.jsonl", "--image-folder", "images", "--conv-mode", "v1"]
    arguments += ["--answers-file", "answers.jsonl", "--max-new-tokens", "2", *(["--model-base", base] if base else [])]
    arguments += ["--vision-tower", "clip"] if folder == "clip" else []
    check = case.check_answers("questions.jsonl", "answers.jsonl")
    case.run(arguments, outputs=["answers.jsonl"], names=names, expect=_unless_unread(expect, folder), check=check)


def _convert(case: Case, folder: str, names: set[str], expect: str) -> None:
    source, base = _source(case, folder)
    arguments = ["convert", source, "converted", "--to", "llava" if source == "hf" else "hf"]
    arguments += ["--model-base", base] if base else []
    arguments += ["--vision-tower", "clip"] if folder == "clip" else []
    case.run(
        arguments,
        outputs=["converted"],
        names=names,
        expect=_unless_unread(expect, folder),
        check=case.check_model("converted"),
    )


def _merge(case: Case, folder: str, names: set[str], expect: str) -> None:
    source, base = _source(case, folder)
    if base is None:
        return
    arguments = ["merge", source, "merged", "--model-base", base]
    arguments += ["--vision-tower", "clip"] if folder == "clip" else []
    case.run(
        arguments,
        outputs=["merged"],
        names=names,
        expect=_unless_unread(expect, folder),
        check=case.check_model("merged"),
    )


def _unless_unread(expect: str, folder: str) -> str:
    # The tower's last block and text part are never read, nor a checkpoint's optimizer state but in training.
    return "either" if folder == "clip" or "checkpoint-" in folder else expect
