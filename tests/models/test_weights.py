"""Models filled from files: what `upcycle` would make, whole or a share of the experts, and nothing left at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.build import HEAD_BIAS, build_empty, config_of
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import as_moe_llava, upcycle
from moe_lvlm.models.weights import load_weights, replace_parameter
from moe_lvlm.moe.types import ExpertSlice
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_models import collate, tiny_llava, tiny_moe_llava, tiny_samples

CONFIG = MoEConfig(layers=(0, 2), num_experts=4, fine_grained=2, shared_experts=1)


def dense_model(family: str = "llama") -> MoELlavaForConditionalGeneration:
    """A dense model of our class, in which a Phi has its own head, with a bias."""
    model = as_moe_llava(tiny_llava(family))
    if family in HEAD_BIAS:
        torch.manual_seed(0)
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
        model.config.language_head_bias = True
    return model


def save_dense(folder: Path, family: str = "llama") -> Path:
    dense_model(family).save_pretrained(folder)
    return folder


def fill(folder: Path, moe: MoEConfig | None = None, **options: Any) -> MoELlavaForConditionalGeneration:
    """A model in the shape of the folder's one, sparse if asked for, filled from it."""
    config = config_of(folder)
    model = build_empty(config if moe is None else config.with_moe(moe))
    load_weights(model, open_source(folder), **options)
    return model.eval()


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Write tensors (`__` for dots) into the folder's file; None takes one out."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, value in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if value is not None:
            stored[name.replace("__", ".")] = value
    save_file(stored, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "qwen2"])
def test_a_dense_folder_makes_what_upcycle_makes(family: str, tmp_path: Path) -> None:
    """Experts, shared experts and all else bit for bit; the routers are drawn anew."""
    loaded = fill(save_dense(tmp_path, family), CONFIG)
    expected = upcycle(dense_model(family), CONFIG)
    ours, theirs = dict(loaded.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape
        assert torch.equal(value, theirs[name]) or ".router." in name, name
    batch = collate(tiny_samples())
    for name, value in ours.items():
        if ".router." in name:
            theirs[name].data.copy_(value)
    with torch.no_grad():
        logits = loaded(**batch).logits
        torch.testing.assert_close(logits, expected.eval()(**batch).logits, rtol=0, atol=0)


def test_routers_follow_their_seed_and_leave_the_generator_alone(tmp_path: Path) -> None:
    save_dense(tmp_path)

    def routers(seed: int) -> list[Tensor]:
        model = build_empty(config_of(tmp_path).with_moe(CONFIG))
        before = torch.get_rng_state()
        load_weights(model, open_source(tmp_path), router_seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [layer.router.gate.weight for _, layer in moe_layers(model)]

    first, again, other = routers(1), routers(1), routers(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(*first)
    # N(0, 0.02): 128 numbers
    assert 0.01 < first[0].std() < 0.03


@pytest.mark.parametrize("is_source_sparse", [True, False])
def test_a_share_of_the_experts(is_source_sparse: bool, tmp_path: Path) -> None:
    """As under expert parallelism: experts 2 and 3 of 4, cut from a dense folder or read from a sparse one."""
    if is_source_sparse:
        tiny_moe_llava(CONFIG).save_pretrained(tmp_path)
    else:
        save_dense(tmp_path)
    whole = fill(tmp_path, CONFIG)
    model = build_empty(config_of(tmp_path).with_moe(CONFIG))
    for _, layer in moe_layers(model):
        for leaf, stack in list(layer.experts.named_parameters()):
            replace_parameter(layer.experts, leaf, torch.empty(2, *stack.shape[1:], device="meta"))
            layer.experts.get_parameter(leaf).expert_slice = ExpertSlice(2, 4, 4)  # type: ignore[attr-defined]
    load_weights(model, open_source(tmp_path))
    for name, value in model.named_parameters():
        expected = whole.get_parameter(name)
        assert torch.equal(value, expected[2:4] if ".experts." in name and "shared" not in name else expected), name


def test_a_replaced_parameter_keeps_its_marks() -> None:
    linear = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    linear.weight.group_name = "ep_size_2"  # type: ignore[attr-defined]
    replace_parameter(linear, "weight", torch.ones(3, 2))
    assert torch.equal(linear.weight, torch.ones(3, 2))
    assert not linear.weight.requires_grad
    assert linear.weight.group_name == "ep_size_2"  # type: ignore[attr-defined]


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    dense = tiny_llava(tie_word_embeddings=True)
    config = dense.config
    config.tie_word_embeddings = True
    dense.tie_weights()
    as_moe_llava(dense).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = fill(tmp_path, CONFIG)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, dense.get_input_embeddings().weight)


def test_low_precision(tmp_path: Path) -> None:
    loaded = fill(save_dense(tmp_path), CONFIG, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = tiny_llava().state_dict()["lm_head.weight"].bfloat16()
    assert torch.equal(loaded.lm_head.weight, expected)


def test_a_llava_of_transformers_around_a_phi_comes_back(tmp_path: Path) -> None:
    """Its head has no bias, unlike that of a Phi alone."""
    upcycle(tiny_llava("phi"), CONFIG).save_pretrained(tmp_path)
    loaded = fill(tmp_path)
    assert torch.equal(loaded.lm_head.weight, tiny_llava("phi").lm_head.weight)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    change(save_dense(tmp_path), **{name: None})
    with pytest.raises(ValueError, match=name):
        fill(tmp_path)


def test_a_missing_ffn_matrix_is_named_when_experts_are_cut(tmp_path: Path) -> None:
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    change(save_dense(tmp_path), **{name: None})
    with pytest.raises(ValueError, match=name):
        fill(tmp_path, CONFIG)


def test_a_missing_expert_matrix_is_named(tmp_path: Path) -> None:
    tiny_moe_llava(CONFIG).save_pretrained(tmp_path)
    name = "model.language_model.layers.2.mlp.experts.w3"
    change(tmp_path, **{name: None})
    with pytest.raises(ValueError, match=name):
        fill(tmp_path)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    change(save_dense(tmp_path), model__extra=torch.ones(2))
    with pytest.raises(ValueError, match=r"1 tensors of the source have no place .*: model\.extra"):
        fill(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lm_head.weight", (64, 31)), ("model.language_model.layers.0.mlp.experts.w1", (5, 24, 32))],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tiny_moe_llava(CONFIG).save_pretrained(tmp_path)
    change(tmp_path, **{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=name) as caught:
        fill(tmp_path)
    assert str(shape) in str(caught.value)


def test_experts_of_another_width_are_refused(tmp_path: Path) -> None:
    """The configuration says 3 x 16, the stored FFN has 48 columns less one."""
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    change(save_dense(tmp_path), **{name: torch.ones(32, 47)})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp"):
        fill(tmp_path, CONFIG)


def test_shards(tmp_path: Path) -> None:
    """A folder in several files, as large models come."""
    model = tiny_moe_llava(CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    loaded = fill(tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
