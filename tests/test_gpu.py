"""What only a GPU can show: kernels, 16-bit types, waits, memory. `scripts/gpu_check.sh` runs the tests marked `gpu`.

Each test runs on the CPU too, as a rehearsal: there loops stand in for FlashAttention's kernels, and a device that is
not there for a GPU's waits. Models are tiny, in shapes that the kernels take.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.projectors import peak_bytes
from llava.constants import IGNORE_INDEX
from llava.model.language_model import staged
from llava.model.language_model.packed import PACKED_SDPA, PACKED_VARLEN, best_packed_attention
from llava.model.language_model.staged import StagedCache
from llava.transfer import HostBatch
from tests.test_model import pictures
from tests.test_staged import GREEDY, PYRAMID, gradients, padded, staged_model, training_batch
from tests.test_waits import METHODS, collated, waits_of_a_step
from tests.tiny_models import tiny_model
from tests.varlen_kernels import put_loops, set_attention

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"))
PLACES = ("cpu", pytest.param("cuda", marks=GPU))
REDUCTIONS = {"none": "none", "pyramiddrop": PYRAMID, "fastv": {"name": "fastv", "layer": 2, "ratio": 0.6}}
SHAPES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # FlashAttention takes multiples of 8
# How far from float32 a step in 16 bits may be: the loss, and all gradients as one vector, relatively.
TOLERANCE = {torch.bfloat16: (0.02, 0.06), torch.float16: (0.005, 0.01)}
# How far FlashAttention may be from sdpa in bfloat16, and how many of the tokens that stay must be the same.
KERNEL_TOLERANCE, SAME_CHOICE = (0.02, 0.06), 0.8
REHEARSED_WAITS = ("none", "prumerge", "pyramiddrop")
BATCH_ON_DEVICE = ("input_ids", "attention_mask", "labels", "images")


def places(values: Any, rehearsed: Any) -> list[Any]:
    """Pairs of a device and a value: all on the GPU, some on the CPU."""
    return [
        *(pytest.param("cpu", value, id=f"cpu-{value}") for value in rehearsed),
        *(pytest.param("cuda", value, id=f"cuda-{value}", marks=GPU) for value in values),
    ]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without TF32, which cuDNN's convolutions take otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A batch on a device; its pictures in a type."""
    if isinstance(value, dict):
        return {key: moved(one, device, dtype) if key in BATCH_ON_DEVICE else one for key, one in value.items()}
    if isinstance(value, list):
        return [moved(one, device, dtype) for one in value]
    return value.to(device, dtype if value.is_floating_point() else None)


def model_on(device: str, reduction: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return staged_model(reduction=reduction, **{**SHAPES, **settings}).to(device, dtype)


def take_kernel(model: Any, attention: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model run FlashAttention, or the loops in its place; skips where the GPU does not have it."""
    if device == "cpu":
        put_loops(monkeypatch)
    elif attention == PACKED_VARLEN:
        if best_packed_attention(model.config, is_16_bit=True) != PACKED_VARLEN:
            here = f"{torch.cuda.get_device_name()} with torch {torch.__version__}"
            pytest.skip(f"varlen_attn with grouped queries needs compute capability 8.0 and torch 2.12, not {here}")
    else:
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    set_attention(model, attention)


class Choices:
    """Has a second run drop the tokens that the first one dropped, since rounding decides between equals.

    `same` is the share of tokens that the second run would have treated as the first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._choose = staged.keep_best
        self._first: list[Tensor] = []
        self._again: Iterator[Tensor] | None = None
        self.same = 1.0
        monkeypatch.setattr(staged, "keep_best", self)

    def again(self) -> None:
        """What follows is the second run."""
        self._again = iter(self._first)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        chosen = self._choose(*args, **kwargs)
        if self._again is None:
            self._first.append(chosen)
            return chosen
        first = next(self._again).to(chosen.device)
        self.same = min(self.same, float((first == chosen).float().mean()))
        return first


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between gradients as one vector, relative to its length."""
    assert got.keys() == expected.keys()
    off = sum(float((got[name].cpu().float() - one.cpu().float()).square().sum()) for name, one in expected.items())
    return (off / sum(float(one.float().square().sum()) for one in expected.values())) ** 0.5


# FlashAttention


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("attention", [PACKED_VARLEN, "flash_attention_2"])
@pytest.mark.parametrize("device", PLACES)
def test_flash_attention_trains_as_sdpa(
    device: str, attention: str, method: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_on(device, REDUCTIONS[method], torch.bfloat16).train()
    batch = {**moved(training_batch(), device, torch.bfloat16), "packed": packed, "use_cache": False}
    choices = Choices(monkeypatch)
    set_attention(model, PACKED_SDPA if packed else "sdpa")
    loss, expected = gradients(model, batch)
    choices.again()
    take_kernel(model, attention, device, monkeypatch)
    other, got = gradients(model, batch)
    assert float(other) == pytest.approx(float(loss), rel=KERNEL_TOLERANCE[0])
    assert distance(got, expected) < KERNEL_TOLERANCE[1]
    assert choices.same >= SAME_CHOICE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("attention", [PACKED_VARLEN, "flash_attention_2"])
@pytest.mark.parametrize("device", PLACES)
@torch.no_grad()
def test_flash_attention_generates_as_sdpa(
    device: str, attention: str, method: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_on(device, REDUCTIONS[method], torch.bfloat16)
    batch = moved(padded(side), device, torch.bfloat16)
    choices = Choices(monkeypatch)
    expected = answer(model, batch)
    choices.again()
    take_kernel(model, attention, device, monkeypatch)
    got = answer(model, batch)
    assert isinstance(got.past_key_values, StagedCache) == (method != "none")
    assert_same_answer(got, expected, tolerance=0.1)


def answer(model: Any, batch: dict[str, Any]) -> Any:
    return model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)


def assert_same_answer(got: Any, expected: Any, tolerance: float) -> None:
    """Logits of each row, relatively, up to the first token between whose choices rounding decided."""
    same = torch.ones(len(expected.sequences), dtype=torch.bool)
    steps = zip(got.logits, expected.logits, strict=True)
    for step, (logits, wanted) in enumerate(steps):
        logits, wanted = logits.cpu().float()[same], wanted.cpu().float()[same]
        off = (logits - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert off.max() < tolerance, f"token {step}: {off.tolist()}"
        chosen, other = got.logits[step].argmax(1).cpu(), expected.logits[step].argmax(1).cpu()
        same &= chosen == other
        if not same.any():
            break
    assert step >= 1, "no row has two tokens in common"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("device", PLACES)
@torch.no_grad()
def test_a_device_generates_as_the_cpu(device: str, method: str, side: str) -> None:
    """In float32, with the staged cache where tokens are dropped."""
    model = model_on("cpu", REDUCTIONS[method])
    expected = answer(model, padded(side))
    got = answer(model.to(device), moved(padded(side), device))
    assert_same_answer(got, expected, tolerance=1e-3)
    if method != "none":
        lengths = [[layer.keys.shape[2] for layer in one.past_key_values.layers] for one in (got, expected)]
        assert lengths[0] == lengths[1]
        assert lengths[0][0] > lengths[0][-1]


# Types


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("device", PLACES)
def test_16_bits_are_near_float32(
    device: str, dtype: torch.dtype, autocast: bool, method: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        pytest.skip(f"{torch.cuda.get_device_name()} has no bfloat16")
    model = model_on(device, REDUCTIONS[method]).train()
    set_attention(model, PACKED_SDPA if packed else "sdpa")
    batch = {**moved(training_batch(), device), "packed": packed, "use_cache": False}
    choices = Choices(monkeypatch)
    loss, expected = gradients(model, batch)
    choices.again()
    with torch.autocast(device, dtype, enabled=autocast):
        if not autocast:
            model, batch = model.to(dtype), moved(batch, device, dtype)
        other, got = gradients(model, batch)
    assert float(other) == pytest.approx(float(loss), rel=TOLERANCE[dtype][0])
    assert distance(got, expected) < TOLERANCE[dtype][1]
    assert choices.same >= SAME_CHOICE


@pytest.mark.parametrize("device", PLACES)
def test_qlora(device: str, tmp_path: Path) -> None:
    """A base in four bits learns through its adapters."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from llava.train.modeling import load_model, load_tokenizer, read_config
    from llava.train.settings.parsing import parse_args
    from tests.tiny_world import make_tiny_world

    world = make_tiny_world(tmp_path / "world")
    given = {"bits": 4, "lora_enable": True, "lora_dropout": 0.0, "use_cpu": device == "cpu"}
    arguments = parse_args(world.flags(tmp_path / "run", **given))
    config = read_config(arguments)
    model = load_model(arguments, config, load_tokenizer(arguments)).train()
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = moved({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses


# torch.compile


@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("device", PLACES)
def test_compiled_tower_and_layers_are_eager_ones(device: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not (has_compiler() and Path(sysconfig.get_path("include"), "Python.h").is_file()):
        pytest.skip("torch.compile needs a C compiler and Python.h here (apt install gcc python3-dev)")
    model = model_on(device, REDUCTIONS[method]).train()
    batch = {**moved(training_batch(), device), "use_cache": False}
    choices = Choices(monkeypatch)
    loss, expected = gradients(model, batch)
    choices.again()
    torch.compiler.reset()
    for module in compiled_parts(model):
        module.compile(backend="aot_eager" if device == "cpu" else "inductor")
    other, got = gradients(model, batch)
    assert float(other) == pytest.approx(float(loss), rel=1e-4)
    assert distance(got, expected) < 1e-3
    torch.compiler.reset()


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def compiled_parts(model: Any) -> list[nn.Module]:
    """The vision tower's encoder, and the language model's layers."""
    inner = model.get_model()
    return [inner.get_vision_tower().vision_tower, *inner.layers]


# Waits and memory


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("device", "method"), places(METHODS, REHEARSED_WAITS))
def test_a_step_waits_for_the_device_as_often_as_counted(device: str, method: str, packed: bool) -> None:
    reduction, expected, _ = METHODS[method]
    model = staged_model(reduction=reduction, **SHAPES).train()
    set_attention(model, PACKED_SDPA if packed else "sdpa")
    waits = (waits_of_a_step if device == "cpu" else waits_on_gpu)(
        model, collated() if device == "cpu" else batch_on_gpu(), packed=packed
    )
    assert len(waits) == expected, waits


def batch_on_gpu() -> dict[str, Any]:
    """As the Trainer hands the collator's batch to the model."""
    batch = training_batch()
    host = HostBatch(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"])
    return {**moved({**batch, "images": pictures(False)}, "cuda"), "host": host}


def waits_on_gpu(model: Any, batch: dict[str, Any], **settings: Any) -> list[str]:
    """Places of a step, after one that warms up, in which the host waits for the GPU."""
    model.to("cuda")

    def step() -> None:
        model(**batch, use_cache=False, **settings).loss.backward()

    step()
    return syncs_of(step)


def syncs_of(run: Callable[[], object]) -> list[str]:
    """Places in which torch says that the host waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA operation" in str(one.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_waits_are_seen() -> None:
    """Otherwise the counts of this file would say nothing."""
    assert len(syncs_of(lambda: torch.ones(3, device="cuda").sum().item())) == 1
    assert syncs_of(lambda: torch.ones(3, device="cuda").sum()) == []


@pytest.mark.parametrize("device", PLACES)
def test_the_loss_never_holds_the_logits_of_all_tokens(device: str) -> None:
    """Of 1024 tokens with 32000 words, 64 learnt, float32 logits would take 131 MB, and their gradient as much."""
    model = tiny_model(**SHAPES, vocab_size=32000, max_position_embeddings=1024).to(device).train()
    model.lm_head.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.randint(3, 32000, (2, 512), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -32:] = ids[:, -32:]
    batch = moved({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}, device)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()

    step()
    assert peak_bytes(step, device) < 2 * 512 * 32000 * 4 / 2
