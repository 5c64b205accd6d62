"""Checkpoints of every layout open, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from llava.model.builder import load_pretrained_model
from llava.model.language_model.families import LlavaLlamaForCausalLM, llava_class_for
from tests.tiny_models import BACKBONES, prompt, tiny_model
from tests.tiny_world import SIDE, TinyWorld, make_tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def llava_on(world: TinyWorld, **settings: Any) -> Any:
    """The tiny language model with the tiny tower and a random projector."""
    torch.manual_seed(1)
    model = LlavaLlamaForCausalLM.from_pretrained(str(world.llm))
    args = {
        "vision_tower": str(world.clip),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "pretrain_mm_mlp_adapter": None,
        **settings,
    }
    model.get_model().initialize_vision_modules(type("Args", (), args))
    return model.eval()


def save(model: Any, world: TinyWorld, folder: Path, **kwargs: Any) -> Path:
    """A full checkpoint with its tokenizer."""
    model.save_pretrained(folder, **kwargs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.llm / name, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = change(load_file(path))
    save_file(weights, path, metadata={"format": "pt"})


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return model(input_ids=prompt(3, "image", 5).unsqueeze(0), images=pixels.to(model.dtype)).logits


def open_model(folder: Path, **kwargs: Any) -> Any:
    return load_pretrained_model(folder, device="cpu", **kwargs)[1]


def assert_same_model(opened: Any, model: Any) -> None:
    """Every weight bit for bit; the logits nearly, since weights at other places in memory take other CPU kernels."""
    weights, expected = opened.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype and torch.equal(weights[name], weight), name
    torch.testing.assert_close(answer(opened), answer(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_saved_model_opens_as_it_was(world: TinyWorld, tmp_path: Path, shard: str) -> None:
    model = llava_on(world)
    model.set_reduction({"name": "prumerge", "ratio": 0.5})
    folder = save(model, world, tmp_path / "full", max_shard_size=shard)
    tokenizer, opened, processor, context = load_pretrained_model(folder, device="cpu")
    assert opened.config.reduction == {"encoder": {"name": "prumerge", "ratio": 0.5}}
    assert_same_model(opened, model)
    assert (len(tokenizer), processor.crop_size["height"], context) == (259, SIDE, 1024)
    assert not opened.training


def test_saved_names_are_llavas(world: TinyWorld, tmp_path: Path) -> None:
    names = set(load_file(save(llava_on(world), world, tmp_path / "full") / "model.safetensors"))
    assert "model.mm_projector.0.weight" in names
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight" in names


def test_a_checkpoint_with_its_tower_opens_without_the_towers_folder(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world)
    folder = save(model, world, tmp_path / "full")
    edit_config(folder, mm_vision_tower="nowhere/clip")
    model.get_vision_tower().image_processor.save_pretrained(folder)
    torch.testing.assert_close(answer(open_model(folder)), answer(model))


def test_a_checkpoint_without_its_tower_reads_it_from_its_folder(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world)
    folder = save(model, world, tmp_path / "full")
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if "vision_tower" not in k})
    torch.testing.assert_close(answer(open_model(folder)), answer(model))
    edit_config(folder, mm_vision_tower="nowhere/clip", mm_vision_config=None)
    torch.testing.assert_close(answer(open_model(folder, vision_tower=world.clip)), answer(model))
    with pytest.raises(ValueError, match="vision tower 'nowhere/clip' is neither a folder"):
        open_model(folder)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_old_releases_of_bin_files_open(world: TinyWorld, tmp_path: Path, model_type: str) -> None:
    model = llava_on(world)
    folder = save(model, world, tmp_path / "full")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old transformers saved this buffer
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    edit_config(folder, model_type=model_type)
    torch.testing.assert_close(answer(open_model(folder)), answer(model))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_class_follows_model_type(world: TinyWorld, tmp_path: Path, backbone: str) -> None:
    model = tiny_model(backbone, mm_vision_tower=str(world.clip))
    folder = save(model, world, tmp_path / backbone)
    opened = open_model(folder)
    assert type(opened) is type(model) is llava_class_for(backbone)
    assert {k: v.shape for k, v in opened.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_reduction_of_the_caller_goes_before_the_configs(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world)
    model.set_reduction("prumerge")
    folder = save(model, world, tmp_path / "full")
    assert open_model(folder).get_model().encoder_reducer is not None
    assert open_model(folder, reduction="none").get_model().encoder_reducer is None
    assert open_model(folder, reduction={"name": "prumerge", "ratio": 0.5}).config.reduction["encoder"]["ratio"] == 0.5


def test_dtype_is_the_checkpoints_unless_given(world: TinyWorld, tmp_path: Path) -> None:
    folder = save(llava_on(world).to(torch.bfloat16), world, tmp_path / "full")
    opened = open_model(folder)
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}
    assert answer(opened).dtype == torch.bfloat16
    assert {p.dtype for p in open_model(folder, dtype=torch.float32).parameters()} == {torch.float32}


def projector_folder(world: TinyWorld, folder: Path, model: Any) -> Path:
    folder.mkdir()
    model.config.save_pretrained(folder)
    weights = {f"model.{k}": v for k, v in model.get_model().state_dict().items() if "mm_projector" in k}
    torch.save(weights, folder / "mm_projector.bin")
    return folder


def test_a_projector_folder_opens_on_its_base(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world)
    folder = projector_folder(world, tmp_path / "projector", model)
    torch.testing.assert_close(answer(open_model(folder, model_base=world.llm)), answer(model))


def test_a_pretrained_projector_starts_the_next_stage(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world)
    projector = projector_folder(world, tmp_path / "projector", model) / "mm_projector.bin"
    torch.testing.assert_close(answer(llava_on(world, pretrain_mm_mlp_adapter=str(projector))), answer(model))
    with pytest.raises(ValueError, match=r"missing \(2\): mm_projector.bias.*unexpected \(4\): mm_projector.0.bias"):
        llava_on(world, pretrain_mm_mlp_adapter=str(projector), mm_projector_type="linear")


def test_lora_folder_opens_on_its_base_merged_and_unmerged(world: TinyWorld, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = llava_on(world)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.layers\.\d+\.self_attn\.[qv]_proj"))
    adapted.requires_grad_(True)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.5)
    folder = tmp_path / "lora"
    adapted.save_pretrained(folder)
    model.config.save_pretrained(folder)
    trained = {k: v for k, v in adapted.state_dict().items() if "mm_projector" in k}
    torch.save(trained, folder / "non_lora_trainables.bin")
    expected = answer(adapted.base_model.model.eval())
    opened = open_model(folder, model_base=world.llm)
    assert isinstance(opened, LlavaLlamaForCausalLM)
    torch.testing.assert_close(answer(opened), expected)
    merged = open_model(folder, model_base=world.llm, merge_lora=True)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(answer(merged), expected, atol=1e-4, rtol=1e-4)
    assert (answer(open_model(projector_folder(world, tmp_path / "p", model), model_base=world.llm)) - expected).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "mm_projector" not in k},
            r"missing \(4\): model.mm_projector.0.bias",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, r"missing \(3\): model.layers.1.mlp"),
        (lambda w: {k: v for k, v in w.items() if "layers.0.self_attn.k_proj" not in k}, "missing"),
        (lambda w: {**w, "model.extra.weight": torch.ones(2)}, r"unexpected \(1\): model.extra.weight"),
        (
            lambda w: {**w, "model.mm_projector.0.weight": torch.ones(32, 20)},
            r"wrong shape \(1\): model.mm_projector.0.weight \(32, 20\), the model has \(32, 24\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(world: TinyWorld, tmp_path: Path, change: Any, message: str) -> None:
    folder = save(llava_on(world), world, tmp_path / "full")
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        open_model(folder)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_that_is_not_there(world: TinyWorld) -> None:
    with pytest.raises(ValueError, match=r"needs a GPU and flash-attn: pip install 'llava\[flash\]'"):
        open_model(world.llm, attn_implementation="flash_attention_2")


def test_folders_that_are_no_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint: expected one of model.safetensors"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match=r"is a bare language model: its config.json has no mm_vision_tower"):
        open_model(world.llm)
    with pytest.raises(ValueError, match="is neither a folder nor a model of the hub"):
        open_model(tmp_path / "missing")
    folder = save(llava_on(world), world, tmp_path / "full")
    edit_config(folder, model_type="gpt2")
    with pytest.raises(ValueError, match="no LLaVA on a language model of model_type 'gpt2'"):
        open_model(folder)
    (folder / "config.json").write_text('{"model_type": "llava_llama",')
    with pytest.raises(ValueError, match=r"config.json, line 1, column 30: not valid JSON"):
        open_model(folder)


def test_a_torn_or_hostile_weight_file(world: TinyWorld, tmp_path: Path) -> None:
    folder = projector_folder(world, tmp_path / "projector", llava_on(world))
    whole = (folder / "mm_projector.bin").read_bytes()
    (folder / "mm_projector.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"mm_projector.bin can't be read as a file of weights"):
        open_model(folder, model_base=world.llm)
    torch.save({"model.mm_projector.0.weight": Path("code")}, folder / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector.bin can't be read as a file of weights"):
        open_model(folder, model_base=world.llm)


def test_a_projector_of_another_width(world: TinyWorld, tmp_path: Path) -> None:
    folder = projector_folder(world, tmp_path / "projector", llava_on(world))
    weights = torch.load(folder / "mm_projector.bin", weights_only=True)
    weights["model.mm_projector.2.weight"] = torch.ones(16, 32)
    torch.save(weights, folder / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"model.mm_projector.2.weight \(16, 32\), the model has \(32, 32\)"):
        open_model(folder, model_base=world.llm)


def test_another_tower_than_the_checkpoints(world: TinyWorld, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    from tests.tiny_models import vision_config

    CLIPVisionModel(vision_config(side=28)).save_pretrained(tmp_path / "other")
    folder = save(llava_on(world), world, tmp_path / "full")
    with pytest.raises(ValueError, match="wrong shape"):
        open_model(folder, vision_tower=tmp_path / "other")
    model = llava_on(world)
    args = type("Args", (), {"vision_tower": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="Another tower needs a new projector"):
        model.get_model().initialize_vision_modules(args)


def test_marker_tokens_are_added_once(world: TinyWorld, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = llava_on(world), AutoTokenizer.from_pretrained(world.llm)
    args = {"mm_use_im_patch_token": False, "mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": None}
    model.initialize_vision_tokenizer(type("Args", (), args), tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 261
    model.config.mm_use_im_start_end = True
    folder = save(model, world, tmp_path / "full")  # with the tokenizer of before
    opened_tokenizer, opened, *_ = load_pretrained_model(folder, device="cpu")
    assert len(opened_tokenizer) == opened.get_input_embeddings().num_embeddings == 261
    torch.testing.assert_close(answer(opened), answer(model))
