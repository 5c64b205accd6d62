"""Area `places`: results that would land on, in or around what is the user's."""

from __future__ import annotations

from tests.fuzz.case import BASES, KINDS_OF_RUN, Case, settings_of

FOREIGN = ("llm", "clip", "images", "data.json", ".", "mine", "mine/file.txt", "questions.jsonl", "link", "dangling")


def fuzz(case: Case) -> None:
    """The target of a command is one of the user's places, or a fresh one beside a link."""
    mine = case.folder / "mine"
    mine.mkdir()
    for name in ("file.txt", "config.json", "README.md", "tokenizer.json"):
        (mine / name).write_text("{}" if name.endswith("json") else "mine")
    (case.folder / "link").symlink_to("mine")
    (case.folder / "dangling").symlink_to("gone")
    case.random.choice([_train, _train, _convert, _merge, _eval])(case)


def _train(case: Case) -> None:
    kind = case.random.choice(KINDS_OF_RUN)
    target = case.random.choice([*FOREIGN, *(f"runs/{kind}" for kind in KINDS_OF_RUN), "hf", "runs"])
    config = case.write_config(settings_of(kind, target))
    # A finished run started again is told to be finished; a folder of another run may be refused, or taken over.
    run = target if target.startswith("runs/") else None
    expect = "works" if target == f"runs/{kind}" else "either"
    check = case.check_run(target, kind)
    case.run(
        ["train", config], names=_names(target), outputs=["*"], own=[run] if run else [], expect=expect, check=check
    )


def _convert(case: Case) -> None:
    kind = case.random.choice(KINDS_OF_RUN)
    source = case.random.choice([f"runs/{kind}", "hf"])
    base = None if source == "hf" else BASES[kind]
    to = "llava" if source == "hf" else case.random.choice(["hf", "llava"])
    target = case.random.choice([*FOREIGN, "runs", source, f"{source}/new", "runs/new", "hf"])
    arguments = ["convert", source, target, "--to", to, *(["--model-base", base] if base else [])]
    overwrite = case.random.random() < 0.5
    arguments += ["--overwrite"] if overwrite else []
    own = ["hf"] if overwrite and target == "hf" and source != "hf" else []
    outputs = [target] if target.endswith("/new") else ["gone", "dangling"]  # a link, and what it names
    expect = "works" if target == "runs/new" else "either"
    check = case.check_copy(source, base, target)
    case.run(arguments, names=_names(target, source), outputs=outputs, own=own, expect=expect, check=check)


def _merge(case: Case) -> None:
    kind = case.random.choice(("lora", "projector"))
    target = case.random.choice([*FOREIGN, "runs/full", f"runs/{kind}", f"runs/{kind}/new", "runs/new"])
    outputs = [target] if target.endswith("/new") else ["gone", "dangling"]
    expect = "works" if target == "runs/new" else "either"
    arguments = ["merge", f"runs/{kind}", target, "--model-base", "llm"]
    check = case.check_copy(f"runs/{kind}", "llm", target)
    case.run(arguments, names=_names(target, f"runs/{kind}"), outputs=outputs, expect=expect, check=check)


def _eval(case: Case) -> None:
    target = case.random.choice(
        [*FOREIGN, "answers.jsonl", "mine/answers.jsonl", "runs/full/config.json", "new/a.jsonl"]
    )
    fresh = target.endswith(("answers.jsonl", "a.jsonl"))
    arguments = ["eval", "runs/full", "--question-file", "questions.jsonl", "--image-folder", "images"]
    arguments += ["--answers-file", target, "--max-new-tokens", "2", "--conv-mode", "v1"]
    outputs = [target, "new"] if fresh else ["gone"]  # what the link names
    check = case.check_answers("questions.jsonl", target)
    case.run(arguments, names=_names(target), outputs=outputs, expect="works" if fresh else "either", check=check)


def _names(*places: str) -> set[str]:
    return {"output", "target", "answers", *(place for place in places if place != ".")}
