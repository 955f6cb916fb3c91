"""A dense model upcycled on the disk is the one that `load_weights` makes while it loads, and computes what it did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

import moe_lvlm
from moe_lvlm.checkpoint.source import LazySource, LazyTensor, open_source
from moe_lvlm.config.load import RecipeError
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.folder import open_model, summarize, write_converted
from moe_lvlm.conversion.upcycling import read_moe_settings, upcycle_folder, upcycle_weights
from moe_lvlm.models.build import build_empty, config_of
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.models.weights import load_weights
from tests.conversion.layouts import logits, tiny_vlm, write_tokenizer, write_transformers
from tests.tiny_models import TEXT_CONFIGS

PLAIN = MoEConfig(layers=(0, 2), num_experts=4)
FINE = MoEConfig.model_validate(
    {"layers": "dense", "num_experts": 4, "fine_grained": 2, "shared_experts": 1, "router": {"kind": "ltdr"}}
)
DYNAMIC = MoEConfig.model_validate({"router": {"kind": "dynamic", "initial_experts": 3}})
COSINE = MoEConfig.model_validate({"router": {"kind": "ltdr", "gate": {"kind": "cosine"}}})


def write_dense(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """A dense model of ours with its processor."""
    write_transformers(folder, tiny_vlm(family, **fields), rename=lambda name: name)
    as_moe_llava(tiny_vlm(family, **fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", sorted(TEXT_CONFIGS))
def test_it_computes_what_the_dense_model_does(family: str, tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", family)
    write_converted(upcycle_folder(folder, PLAIN, router_seed=0), tmp_path / "sparse")
    loaded, _ = moe_lvlm.load(tmp_path / "sparse")
    assert loaded.config.moe_config == PLAIN
    torch.testing.assert_close(logits(loaded), logits(tiny_vlm(family)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("moe", [PLAIN, FINE, DYNAMIC, COSINE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_load_weights(family: str, moe: MoEConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", family)
    expected = build_empty(config_of(folder).with_moe(moe))
    load_weights(expected, open_source(folder), dtype=dtype, router_seed=5)
    before = torch.get_rng_state()
    converted = upcycle_folder(folder, moe, router_seed=5).to(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    state = expected.state_dict()
    assert list(converted.weights.names()) == list(state)
    for name, value in state.items():
        assert torch.equal(converted.weights.read(name), value), name
    stack = "model.language_model.layers.0.mlp.experts.w2"
    assert torch.equal(converted.weights.read(stack, 1, 3), state[stack][1:3])


def test_transformers_own_llava_is_a_source(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "hf", tiny_vlm(), rename=lambda name: name.removeprefix("model."))
    ours = upcycle_folder(write_dense(tmp_path / "dense"), PLAIN, router_seed=1).weights
    plain = upcycle_folder(folder, PLAIN, router_seed=1).weights
    assert all(torch.equal(plain.read(name), ours.read(name)) for name in ours.names())


def test_a_folder_that_trains(tmp_path: Path) -> None:
    """Where a run would take it (model.from_pretrained): opened again, and upcycled no second time."""
    folder = write_dense(tmp_path / "dense")
    write_converted(upcycle_folder(folder, FINE, router_seed=0), tmp_path / "sparse", max_shard_bytes=20_000)
    assert (tmp_path / "sparse" / "model.safetensors.index.json").is_file()
    opened = open_model(tmp_path / "sparse")
    assert opened.config.moe_config == FINE
    with pytest.raises(ValueError, match="4 experts already"):
        upcycle_folder(tmp_path / "sparse", PLAIN, router_seed=0)


def test_summary(tmp_path: Path) -> None:
    """Two layers of 4 experts (3 x 32 x 48 each), of which a token uses 1: 3 of 4 are idle."""
    folder = write_dense(tmp_path / "dense")
    converted = upcycle_folder(folder, MoEConfig(layers=(0, 2), num_experts=4, top_k=1), router_seed=0)
    summary = summarize(converted, max_shard_bytes=50_000)
    dense = sum(parameter.numel() for parameter in tiny_vlm().parameters())
    assert summary.num_parameters == dense + 2 * (3 * 3 * 32 * 48 + 4 * 32)
    assert summary.num_activated == dense + 2 * 4 * 32
    assert summary.num_bytes == 4 * summary.num_parameters
    assert summary.num_files > 1
    assert [line.partition(":")[0] for line in summary.differences] == ["moe"]


def test_what_is_refused(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="layers: 3 is not a layer"):
        upcycle_folder(folder, MoEConfig(layers=(3,)), router_seed=0)
    with pytest.raises(ValueError, match=r"fine_grained: 5 does not divide the FFN's width \(48\)"):
        upcycle_folder(folder, MoEConfig(num_experts=5, fine_grained=5), router_seed=0)
    clusters = MoEConfig.model_validate({"router": {"kind": "cluster"}})
    with pytest.raises(ValueError, match=r"cluster starts at the centres of data\.clusters"):
        upcycle_folder(folder, clusters, router_seed=0)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama'; allowed: llava, .*moe_llava"):
        upcycle_folder(folder, PLAIN, router_seed=0)
    with pytest.raises(ValueError, match="no such folder"):
        upcycle_folder(tmp_path / "nowhere", PLAIN, router_seed=0)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.layers.2.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named_before_anything_is_written(name: str, tmp_path: Path) -> None:
    opened = open_model(write_dense(tmp_path / "dense"))
    whole = upcycle_weights(opened.config, opened.weights, PLAIN, router_seed=0)
    assert whole[0].moe_config == PLAIN
    kept = {one: LazyTensor.from_source(opened.weights, one) for one in opened.weights.names() if one != name}
    with pytest.raises(ValueError, match=name):
        upcycle_weights(opened.config, LazySource(kept), PLAIN, router_seed=0)


def test_an_unknown_family(tmp_path: Path) -> None:
    """A decoder whose layers are not among those that can become sparse."""
    folder = write_dense(tmp_path / "dense")
    config = config_of(folder)
    config.text_config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8, vocab_size=64
    )
    with pytest.raises(ValueError, match=r"Gemma2DecoderLayer .* cannot become sparse"):
        upcycle_weights(config, open_source(folder), MoEConfig(), router_seed=0)


def test_settings_from_overrides() -> None:
    assert read_moe_settings([]) == MoEConfig()
    given = read_moe_settings(["num_experts=8", "router.kind=ltdr", "router.tail_k=8", "layers=[0,2]", "balance.on=[]"])
    assert given == MoEConfig.model_validate(
        {"num_experts": 8, "router": {"kind": "ltdr", "tail_k": 8}, "layers": (0, 2), "balance": {"on": ()}}
    )
    assert not read_moe_settings(["router.renormalize=false"]).router.renormalize
    for override, message in (
        ("num_expert=8", "num_expert: unknown key, did you mean 'num_experts'"),
        ("num_experts=many", "num_experts: 'many'"),
        ("top_k=9", "top_k: 9 is above num_experts"),
        ("router.kind=best", "router"),
        ("router.tail_k=2", "router.top_k.tail_k: unknown key"),
        ("experts", "write key=value"),
        ("top_k=[", "not YAML"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_moe_settings([override])


def test_the_written_folder_keeps_its_tokenizer(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    write_converted(upcycle_folder(folder, PLAIN, router_seed=0), tmp_path / "sparse")
    shutil.rmtree(folder)
    _, processor = moe_lvlm.load(tmp_path / "sparse")
    assert processor.tokenizer.vocab_size == write_tokenizer(tmp_path / "again")
