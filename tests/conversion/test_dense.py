"""A sparse model made dense: the inverse of upcycling, and means by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import moe_lvlm
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.dense import Merge, dense_folder
from moe_lvlm.conversion.folder import write_converted
from moe_lvlm.conversion.upcycling import upcycle_folder
from moe_lvlm.models.build import build_dense
from moe_lvlm.models.processor import load_processor
from tests.conversion.layouts import IMAGE_ID, logits, tiny_vlm, write_transformers
from tests.conversion.test_parts import settings
from tests.conversion.test_upcycling import write_dense
from tests.tiny_models import tiny_moe_llava

MEAN = Merge()


def write_sparse(folder: Path, moe: MoEConfig, family: str = "llama") -> dict[str, Tensor]:
    """A sparse model whose experts differ, with its processor; its weights."""
    write_transformers(folder, tiny_vlm(family), rename=lambda name: name)
    processor = load_processor(write_dense(folder.parent / "for_processor", family))
    model = tiny_moe_llava(moe, family)
    model.config.image_token_index = IMAGE_ID
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.state_dict()


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "phi3", "stablelm"])
@pytest.mark.parametrize(("num_experts", "fine_grained"), [(4, 1), (5, 1), (4, 2), (6, 2), (4, 4)])
def test_upcycling_and_back(family: str, num_experts: int, fine_grained: int, tmp_path: Path) -> None:
    """The dense weights bit for bit, biases and fused matrices too; for numbers of copies that are no power of two."""
    dense = write_dense(tmp_path / "dense", family)
    moe = MoEConfig(layers="dense", num_experts=num_experts, fine_grained=fine_grained)
    write_converted(upcycle_folder(dense, moe, router_seed=0), tmp_path / "sparse")
    for merge in (MEAN, Merge(num_experts // fine_grained - 1)):
        back = dense_folder(tmp_path / "sparse", merge).weights
        expected = load_file(dense / "model.safetensors")
        assert set(back.names()) == set(expected)
        for name, value in expected.items():
            assert torch.equal(back.read(name), value), name


def test_a_low_precision_mean(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    moe = MoEConfig(num_experts=3)
    write_converted(upcycle_folder(dense, moe, router_seed=0).to(torch.bfloat16), tmp_path / "sparse")
    back = dense_folder(tmp_path / "sparse", MEAN).weights
    for name, value in load_file(dense / "model.safetensors").items():
        assert torch.equal(back.read(name), value.bfloat16()), name


def test_means_of_experts_that_differ(tmp_path: Path) -> None:
    """Slices by hand: of 4 experts, 0 and 2 hold the first half of the FFN, 1 and 3 the second."""
    weights = write_sparse(tmp_path / "sparse", MoEConfig(layers=(1,), num_experts=4, fine_grained=2), "phi")
    back = dense_folder(tmp_path / "sparse", MEAN).weights
    ours, mlp = "model.language_model.layers.1.mlp.experts.", "model.language_model.layers.1.mlp."
    w1, w2, b1, b2 = (weights[f"{ours}{leaf}"] for leaf in ("w1", "w2", "b1", "b2"))
    close = {"rtol": 1e-6, "atol": 1e-7}
    expected = torch.cat([(w1[0] + w1[2]) / 2, (w1[1] + w1[3]) / 2])
    torch.testing.assert_close(back.read(f"{mlp}fc1.weight"), expected, **close)
    assert torch.equal(back.read(f"{mlp}fc1.weight", 3, 9), back.read(f"{mlp}fc1.weight")[3:9])
    expected = torch.cat([(w2[0] + w2[2]) / 2, (w2[1] + w2[3]) / 2], dim=1)
    torch.testing.assert_close(back.read(f"{mlp}fc2.weight"), expected, **close)
    torch.testing.assert_close(
        back.read(f"{mlp}fc1.bias"), torch.cat([(b1[0] + b1[2]) / 2, (b1[1] + b1[3]) / 2]), **close
    )
    torch.testing.assert_close(back.read(f"{mlp}fc2.bias"), (b2[0] + b2[1] + b2[2] + b2[3]) / 2, **close)

    group = dense_folder(tmp_path / "sparse", Merge(1))
    assert torch.equal(group.weights.read(f"{mlp}fc1.weight"), torch.cat([w1[2], w1[3]]))
    assert torch.equal(group.weights.read(f"{mlp}fc2.weight"), torch.cat([w2[2], w2[3]], dim=1))
    assert any("dropped" in note for note in group.notes)
    with pytest.raises(ValueError, match=r"expert:2; allowed: 0 to 1"):
        dense_folder(tmp_path / "sparse", Merge(2))


def test_one_expert(tmp_path: Path) -> None:
    weights = write_sparse(tmp_path / "sparse", MoEConfig(layers=(0, 2), num_experts=4))
    back = dense_folder(tmp_path / "sparse", Merge(2)).weights
    layer = "model.language_model.layers.2.mlp."
    assert torch.equal(back.read(f"{layer}up_proj.weight"), weights[f"{layer}experts.w3"][2])
    assert torch.equal(back.read(f"{layer}down_proj.weight"), weights[f"{layer}experts.w2"][2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "phi3", "stablelm"])
def test_plain_for_transformers(family: str, tmp_path: Path) -> None:
    """Transformers' own class reads it without a missing tensor, and computes what ours does."""
    write_sparse(tmp_path / "sparse", MoEConfig(layers=(0, 2), num_experts=4), family)
    write_converted(dense_folder(tmp_path / "sparse", MEAN, is_plain=True), tmp_path / "plain")
    write_converted(dense_folder(tmp_path / "sparse", MEAN), tmp_path / "ours")
    model, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = moe_lvlm.load(tmp_path / "ours")
    assert ours.config.model_type == "moe_llava"
    assert ours.config.moe is None
    assert model.config.model_type == "llava"
    assert torch.equal(logits(model), logits(ours))
    again, _ = moe_lvlm.load(tmp_path / "plain")
    assert torch.equal(logits(again), logits(ours))


def test_what_is_refused(tmp_path: Path) -> None:
    write_sparse(tmp_path / "shared", MoEConfig(num_experts=4, shared_experts=1))
    with pytest.raises(ValueError, match="shared_experts: 1"):
        dense_folder(tmp_path / "shared", MEAN)
    with pytest.raises(ValueError, match="dense already"):
        dense_folder(write_dense(tmp_path / "dense"), MEAN)
    with pytest.raises(ValueError, match="merge: 'median'; allowed: mean, or expert:<g>"):
        Merge.parse("median")
    assert (Merge.parse("mean"), Merge.parse("expert:2")) == (MEAN, Merge(2))


def test_a_head_with_a_bias_is_not_plain(tmp_path: Path) -> None:
    parts: ModelSettings = settings(tmp_path, "phi")
    model, processor = build_dense(parts, seed=0)
    sparse = moe_lvlm.upcycle(model, MoEConfig())
    sparse.save_pretrained(tmp_path / "sparse")
    processor.save_pretrained(tmp_path / "sparse")
    assert "lm_head.bias" in dense_folder(tmp_path / "sparse", MEAN).weights.names()
    with pytest.raises(ValueError, match="head has a bias"):
        dense_folder(tmp_path / "sparse", MEAN, is_plain=True)


def test_experts_that_were_dropped_take_no_part(tmp_path: Path) -> None:
    moe = MoEConfig.model_validate({"layers": [0], "router": {"kind": "dynamic"}})
    weights = write_sparse(tmp_path / "sparse", moe)
    prefix = "model.language_model.layers.0.mlp."
    path = tmp_path / "sparse" / "model.safetensors"
    on_disk = load_file(path)
    on_disk[f"{prefix}router.is_active_E"] = torch.tensor([True, False, False, True])
    save_file(on_disk, path, metadata={"format": "pt"})
    mean = (weights[f"{prefix}experts.w1"][0] + weights[f"{prefix}experts.w1"][3]) / 2
    assert torch.allclose(dense_folder(tmp_path / "sparse", MEAN).weights.read(f"{prefix}gate_proj.weight"), mean)
    with pytest.raises(ValueError, match=r"has dropped expert 1; allowed: mean, or one of its active experts \[0, 3\]"):
        dense_folder(tmp_path / "sparse", Merge(1)).weights.read(f"{prefix}gate_proj.weight")
