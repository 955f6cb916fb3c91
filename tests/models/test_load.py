"""`moe_lvlm.load`: the trained weights of a run, a checkpoint or a saved folder, with the processor that goes with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import moe_lvlm
from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.models.build import build_dense
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.load import find_model
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_models import shake
from tests.tiny_run import tiny_recipe, write_run_inputs

MOE = moe_lvlm.MoEConfig.model_validate(
    {"num_experts": 4, "shared_experts": 1, "router": {"kind": "ltdr", "tail_k": 3}, "balance": {"on": ["language"]}}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model and its processor, saved."""
    return save(tmp_path_factory.mktemp("model"), is_sparse=True)


def save(folder: Path, *, is_sparse: bool) -> Path:
    write_run_inputs(folder)
    settings = ModelSettings.model_validate(tiny_recipe(folder)["model"])
    model, processor = build_dense(settings, seed=3)
    if is_sparse:
        moe_lvlm.upcycle(model, MOE)
        for _, layer in moe_layers(model):
            shake(layer, scale=0.1, seed=1)
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    return folder / "saved"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_holds(model: MoELlavaForConditionalGeneration, expected: dict[str, torch.Tensor]) -> None:
    ours = model.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_saved_folder_round_trip(folder: Path, tmp_path: Path) -> None:
    model, processor = moe_lvlm.load(folder)
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_holds(model, stored(folder))
    assert model.config.moe_config == MOE
    assert [name for name, _ in moe_layers(model)] == [f"model.language_model.layers.{n}.mlp" for n in (0, 2)]
    assert (processor.image_token, processor.tokenizer.convert_tokens_to_ids("red")) == ("<image>", 7)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = moe_lvlm.load(tmp_path)
    assert_holds(again, stored(folder))
    assert stored(tmp_path).keys() == stored(folder).keys()


def test_the_loaded_model_answers_as_the_saved_one(folder: Path) -> None:
    """The same logits as a model built by hand from the file."""
    model, _ = moe_lvlm.load(folder)
    settings = ModelSettings.model_validate(tiny_recipe(folder.parent)["model"])
    other, _ = build_dense(settings, seed=4)
    moe_lvlm.upcycle(other, MOE)
    other.load_state_dict(stored(folder))
    ids = torch.tensor([[1, 4, 4, 4, 4, 11, 12, 13]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(logits, other.eval()(input_ids=ids, pixel_values=pixels).logits)
        assert not torch.equal(logits, model(input_ids=ids, pixel_values=-pixels).logits)


def test_precision_and_attention(folder: Path) -> None:
    model, _ = moe_lvlm.load(folder, dtype=torch.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"


def test_attention_that_routers_read_is_eager() -> None:
    moe = {"router": {"kind": "ltdr", "eea_select": "instruction_aware"}}
    assert MoELlavaConfig(moe=MoEConfig.model_validate(moe).to_dict()).default_attention == "eager"
    assert MoELlavaConfig(moe=MoEConfig().to_dict()).default_attention == "sdpa"
    assert MoELlavaConfig().default_attention == "sdpa"


def test_plain_llava_folders_are_dense_models(tmp_path: Path) -> None:
    saved = save(tmp_path, is_sparse=False)
    expected = stored(saved)
    plain = LlavaForConditionalGeneration.from_pretrained(saved)
    plain.save_pretrained(saved)
    assert '"llava"' in (saved / "config.json").read_text()
    model, _ = moe_lvlm.load(saved)
    assert_holds(model, expected)
    assert model.config.moe_config is None


def test_a_checkpoint_and_the_run_around_it(folder: Path, tmp_path: Path) -> None:
    """The run's newest valid one; a damaged one is passed over."""
    run = tmp_path / "run"
    model, processor = moe_lvlm.load(folder)
    processor.save_pretrained(run / "processor")
    values = []
    for step in (1, 2):
        shake(model, scale=0.1, seed=step)
        values.append({name: value.clone() for name, value in model.state_dict().items()})
        save_checkpoint(
            run / "checkpoints",
            f"tune-{step:06d}",
            live_model(model),
            config=model.config.to_dict(),
            state={"global_step": step},
            rng={},
            ranks=SingleRank(),
            log=print,
        )
    assert find_model(run) == (run / "checkpoints" / "tune-000002", run / "processor")
    assert_holds(moe_lvlm.load(run)[0], values[1])
    one, with_it = moe_lvlm.load(run / "checkpoints" / "tune-000001")
    assert_holds(one, values[0])
    assert with_it.tokenizer.get_vocab() == processor.tokenizer.get_vocab()

    damaged = run / "checkpoints" / "tune-000002" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_holds(moe_lvlm.load(run)[0], values[0])
    shutil.rmtree(run / "checkpoints" / "tune-000001")
    with pytest.raises(ValueError, match="a run without a valid checkpoint"):
        moe_lvlm.load(run)


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        moe_lvlm.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a run"):
        moe_lvlm.load(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama'; allowed: llava, instructblip, blip-2, moe_llava, "):
        moe_lvlm.load(other)


def test_nothing_is_left_at_random(folder: Path, tmp_path: Path) -> None:
    """A plain `from_pretrained` only warns here."""
    for name in ("model.language_model.layers.0.mlp.router.gate.weight", "model.multi_modal_projector.linear_1.bias"):
        copied = shutil.copytree(folder, tmp_path / name)
        tensors = stored(copied)
        del tensors[name]
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            moe_lvlm.load(copied)


def test_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickle files"):
        moe_lvlm.load(copied)


def test_a_folder_without_a_processor_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{tmp_path}: no processor \(processor_config\.json or"):
        moe_lvlm.load(tmp_path)
