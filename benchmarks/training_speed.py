"""Training samples a second at equal model and data: this code, an earlier one of its own, and LLaVA's.

    python -m benchmarks.training_speed --checkout OLD [--checkout ...] [--llava CHECKOUT --python PATH] [--turns 5]

A checkout is a folder with the code of a commit (`git worktree add OLD 0e529b7`). LLaVA's own code runs where a user
has it with its libraries: `--python` names the interpreter of that environment. Each code runs in a process of its
own; all open the same weights and get the same batches, and take turns at them, so that a busy machine slows all of
them. A step is forward, backward and AdamW's update in float32; language model and projector learn, the vision tower
is frozen.

The model is a small Llama with a tiny CLIP; the lengths are those of `benchmarks.packing`. FLOPs of the methods are
those of `llava.cost`, whose formulas count what the tokens of each batch need.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
IGNORED, IMAGE = -100, -200
PYRAMID = {"name": "pyramiddrop", "layers": [2, 4, 6], "ratios": [0.5, 0.25, 0.125]}
METHODS = {
    "none": "none",
    "pyramiddrop": {"decoder": PYRAMID},
    "fastv": {"decoder": {"name": "fastv", "layer": 2, "ratio": 0.5}},
    "prumerge 1/4": {"encoder": {"name": "prumerge", "ratio": 0.25}},
}
OWN_WAYS = [("none", False), *((name, True) for name in METHODS)]
"""Method, and whether the batch is packed."""


# The process of one code: also of LLaVA's own, on older libraries ----------------------------------------------------


class Trainee:
    """The model of one code, and its training step."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.is_llavas = not (Path(sys.path[0]) / "llava/reduction").is_dir()
        self.samples = torch.load(folder / "samples.pt", weights_only=True)
        self.model = self._llavas(folder) if self.is_llavas else self._own(folder)
        torch.manual_seed(1)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("vision_tower" not in name)
        for weight in self.model.get_model().mm_projector.parameters():
            torch.nn.init.normal_(weight, std=0.02)  # the same in all codes, in the order of the weights
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.model.train()

    def _settings(self, folder: Path) -> SimpleNamespace:
        return SimpleNamespace(
            vision_tower=str(folder / "clip"),
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            pretrain_mm_mlp_adapter=None,
            mm_patch_merge_type="flat",
            mm_projector_type="mlp2x_gelu",
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
        )

    def _own(self, folder: Path) -> Any:
        try:
            from llava.model.language_model.families import LlavaLlamaForCausalLM
        except ImportError:  # as it was called at 0e529b7
            from llava.model.language_model import LlavaLlamaForCausalLM
        model = LlavaLlamaForCausalLM.from_pretrained(str(folder / "llm"), attn_implementation="packed_sdpa")
        model.get_model().initialize_vision_modules(self._settings(folder))
        return model.float()

    def _llavas(self, folder: Path) -> Any:
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        model = LlavaLlamaForCausalLM.from_pretrained(str(folder / "llm"))
        model.config.use_cache = False
        model.get_model().initialize_vision_modules(self._settings(folder))
        return model.float()

    def batch(self, indices: list[int], packed: bool) -> dict[str, Any]:
        """As the code's collator makes it."""
        samples = [self.samples[i] for i in indices]
        if not self.is_llavas:
            from llava.data.collator import DataCollatorForSupervisedDataset

            tokenizer = SimpleNamespace(pad_token_id=0, padding_side="right")
            items = [
                {**s, "images": [s["image"]] * s["has_image"], "image_sizes": [(1, 1)] * s["has_image"], "text": ""}
                for s in samples
            ]
            return DataCollatorForSupervisedDataset(tokenizer, packing=packed)(items)
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([s["input_ids"] for s in samples], batch_first=True, padding_value=0)
        labels = pad([s["labels"] for s in samples], batch_first=True, padding_value=IGNORED)
        # LLaVA's dataset gives a text a picture that is encoded and not seen.
        images = torch.stack([s["image"] for s in samples])
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(0), "images": images}

    def step(self, indices: list[int], method: Any, packed: bool) -> dict[str, float]:
        """Seconds of a step by the wall and of the processors, and its loss."""
        batch = self.batch(indices, packed)
        if not self.is_llavas:
            self.model.set_reduction(method)
            batch["num_items_in_batch"] = (batch["labels"][:, 1:] != IGNORED).sum()
        start, processors = time.perf_counter(), time.process_time()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        taken = {"wall": time.perf_counter() - start, "cpu": time.process_time() - processors}
        return {**taken, "loss": float(loss.detach())}


def work(folder: Path) -> None:
    """Answer each line of the standard input, a step to do, with a line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    trainee = Trainee(folder)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(trainee.step(**json.loads(line))), file=answers, flush=True)


# The process that asks them -------------------------------------------------------------------------------------------


class Code:
    """A process that trains by the code of one checkout."""

    def __init__(self, checkout: Path, python: str, folder: Path, threads: int) -> None:
        variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        # The program's own folder is the first place where Python looks for modules: the checkout must be.
        code = f"import sys; sys.path.insert(0, {str(checkout)!r}); import runpy; runpy.run_path({__file__!r}, "
        code += "run_name='worker')['work'](__import__('pathlib').Path(sys.argv[1]))"
        self.process = subprocess.Popen(
            [python, "-c", code, str(folder)],
            cwd=checkout,
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._read() != "ready":
            raise SystemExit(f"the code in {checkout} did not start under {python}; see above")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self, indices: list[int], method: Any, packed: bool) -> dict[str, float]:
        """See `Trainee.step`."""
        assert self.process.stdin is not None
        print(json.dumps({"indices": indices, "method": method, "packed": packed}), file=self.process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._read())
        return answer


@contextmanager
def running(checkout: Path, python: str, folder: Path, threads: int) -> Iterator[Code]:
    code = Code(checkout.resolve(), python, folder, threads)
    try:
        yield code
    finally:
        code.process.kill()


def write_world(folder: Path, args: argparse.Namespace) -> list[tuple[int, int]]:
    """Write models and samples; returns (tokens of text, tokens of its image or 0) of each sample."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig, LlamaForCausalLM

    from benchmarks.packing import draw_samples

    torch.manual_seed(0)
    llm = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    grid = round((576 * args.scale) ** 0.5)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = {**small, "num_hidden_layers": 4, "image_size": 14 * grid, "patch_size": 14}
    text = {**small, "num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    # A whole CLIP: the vision half alone has other names in the transformers of LLaVA's day.
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "clip")
    size = {"height": 14 * grid, "width": 14 * grid}
    CLIPImageProcessor(size={"shortest_edge": 14 * grid}, crop_size=size).save_pretrained(folder / "clip")
    lengths = draw_samples(args.batch * (args.turns + 1), args.scale, seed=0)
    samples = []
    for text, image in lengths:
        ids = torch.randint(3, args.vocabulary, (text + bool(image),))
        if image:
            ids[text // 4] = IMAGE
        labels = torch.where(torch.arange(len(ids)) < len(ids) - text // 2, IGNORED, ids)
        pixels = torch.randn(3, 14 * grid, 14 * grid)
        samples.append({"input_ids": ids, "labels": labels, "image": pixels, "has_image": bool(image)})
    torch.save(samples, folder / "samples.pt")
    return lengths


def flop_ratio(folder: Path, method: Any, lengths: list[tuple[int, int]]) -> float:
    """Arithmetic of training with a method by that without, as `llava.cost` counts it sample by sample."""
    from llava.cost.sizes import open_model
    from llava.cost.training import TrainingRun, training_cost

    llm, clip = (json.loads((folder / name / "config.json").read_text()) for name in ("llm", "clip"))
    vision = clip["vision_config"]
    llava = {"mm_vision_tower": str(folder / "clip"), "mm_vision_config": vision, "mm_vision_select_layer": -2}
    llava |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": vision["hidden_size"]}
    model = open_model({**llm, **llava, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]})
    totals = []
    for reduction in (method, "none"):
        shapes = [TrainingRun(1, int(image > 0), text_tokens=text, head_rows=text // 2) for text, image in lengths]
        costs = [training_cost(model, reduction, replace(shape, checkpointing=False)).macs for shape in shapes]
        totals.append(sum(sum(macs.values()) for macs in costs))
    return totals[0] / totals[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="an earlier code of this project")
    parser.add_argument("--llava", type=Path, help="LLaVA's own code, such as c121f04")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the libraries of --llava")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--scale", type=float, default=0.25, help="multiplies all lengths, for a small machine")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of all threads together")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lengths = write_world(folder, args)
        checkouts = {"now": ROOT, **{str(checkout): checkout for checkout in args.checkout}}
        codes = {
            name: stack.enter_context(running(checkout, sys.executable, folder, args.threads))
            for name, checkout in checkouts.items()
        }
        ways = [(name, *way) for name in codes for way in OWN_WAYS if way[0] in args.methods]
        if args.llava:
            codes["LLaVA"] = stack.enter_context(running(args.llava, args.python, folder, args.threads))
            ways.insert(0, ("LLaVA", "none", False))
        times: dict[tuple[str, str, bool], list[float]] = {way: [] for way in ways}
        for turn in range(args.turns + 1):  # the first warms up, with one sample
            indices = list(range(turn * args.batch, (turn + 1) * args.batch))[: None if turn else 1]
            for way in ways if turn % 2 else reversed(ways):
                name, method, packed = way
                taken = codes[name].step(indices, METHODS[method], packed)
                print(f"turn {turn}: {way} {taken}", file=sys.stderr)  # a run that is ended early has told something
                if turn:
                    times[way].append(taken[args.clock])
        report(args, folder, lengths[args.batch :], times)


def report(
    args: argparse.Namespace,
    folder: Path,
    lengths: list[tuple[int, int]],
    times: dict[tuple[str, str, bool], list[float]],
) -> None:
    """Print a table: samples a second, and ratios turn by turn as median and range."""
    total = sum(text + image for text, image in lengths)
    print(
        f"{args.turns} turns of {args.batch} samples, {total / len(lengths):.0f} tokens on average, "
        f"{args.threads} threads, time: {args.clock}"
    )
    base = times[next((way for way in times if way[1:] == ("none", True) and way[0] != "now"), ("now", "none", True))]
    for (name, method, packed), values in times.items():
        rate = args.batch / statistics.median(values)
        ratio = spread([b / a for a, b in zip(values, base, strict=True)])
        line = f"{name:12.12s} {method:12s} {'packed' if packed else 'padded'} {rate:7.2f} samples/s   {ratio} x"
        if packed and method != "none":
            plain = times[name, "none", True]
            time_ratio = [a / b for a, b in zip(values, plain, strict=True)]
            flops = flop_ratio(folder, METHODS[method], lengths)
            line += f"   time ratio {spread(time_ratio)}, FLOP ratio {flops:.3f}"
        print(line)


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
