"""Stock forms against the trained model: what plain transformers loads computes the same, and is saved the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlavaForConditionalGeneration

from moe_lvlm.checkpoint.model_folder import write_model_folder
from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.stock import NoStockFormError, StockForm, stock_form, stock_source
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from tests.tiny_models import collate, tiny_llava, tiny_moe_llava, tiny_samples

TOP_1 = {"layers": [1], "top_k": 1}
RAW = {"router": {"kind": "top_k", "renormalize": False}}
RAW_TOP_1 = {"top_k": 1, "router": {"kind": "top_k", "top1_weight": "probability"}}
FINE = {"fine_grained": 2, "num_experts": 8, "top_k": 3}
NO_EEA = {"router": {"kind": "ltdr", "eea_select": "none"}}
EVERY = {"layers": "dense"}

# family, fields of the language model, mixture of experts, stock class
EQUAL: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {}, EVERY, "MixtralModel"),
    ("llama", {}, EVERY | FINE | NO_EEA, "MixtralModel"),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}, EVERY | TOP_1 | EVERY, "MixtralModel"),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}, {}, "Qwen2MoeModel"),
    ("llama", {}, EVERY | RAW, "Qwen2MoeModel"),
    ("llama", {}, EVERY | RAW_TOP_1, "Qwen2MoeModel"),
    ("llama", {}, {"shared_experts": 2}, "Qwen2MoeModel"),
    ("mistral", {}, EVERY, "MixtralModel"),
    ("mistral", {}, TOP_1, "Qwen2MoeModel"),
    ("mistral", {"sliding_window": None}, {}, "Qwen2MoeModel"),
    ("phi3", {}, EVERY, "MixtralModel"),
    ("phi3", {}, {"shared_experts": 1}, "Qwen2MoeModel"),
    ("qwen2", {}, EVERY, "Qwen2MoeModel"),
    ("qwen2", {"use_sliding_window": False}, FINE, "Qwen2MoeModel"),
    ("qwen3", {}, RAW, "Qwen3MoeModel"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, FINE, "Qwen3MoeModel"),
]


def in_memory(model: torch.nn.Module) -> LazySource:
    return LazySource({name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()})


def export(model: MoELlavaForConditionalGeneration, folder: Path) -> tuple[StockForm, LlavaForConditionalGeneration]:
    """Written, and loaded by transformers alone."""
    form = stock_form(model.config)
    config = form.config.to_json_string().encode()
    write_model_folder(folder, stock_source(model.config, form, in_memory(model)), documents={"config.json": config})
    loaded, found = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return form, loaded.eval()


@pytest.mark.parametrize(("family", "fields", "moe", "stock"), EQUAL)
def test_the_stock_model_computes_the_same(
    tmp_path: Path, family: str, fields: dict[str, Any], moe: dict[str, Any], stock: str
) -> None:
    model = tiny_moe_llava(MoEConfig.model_validate(moe), family, **fields)
    form, loaded = export(model, tmp_path / "stock")
    assert (form.language_model, type(loaded.model.language_model).__name__) == (stock, stock)
    samples = tiny_samples()
    batches = (
        collate(samples),
        collate(samples, side="left", extra_padding=3),
        collate([samples[1], samples[1]], extra_padding=2),  # text alone
    )
    for batch in batches:
        del batch["labels"]
        is_token = batch["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = model(**batch).logits[is_token], loaded(**batch).logits[is_token]
        assert float((ours - theirs).abs().max()) <= 1e-5
        assert float(ours.abs().max()) > 1  # so that a difference would show
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    left = batches[1]
    assert torch.equal(model.generate(**left, **settings), loaded.generate(**left, **settings))


@pytest.mark.parametrize(
    ("family", "moe"), [("llama", EVERY), ("llama", {}), ("llama", {"shared_experts": 2}), ("phi3", {}), ("qwen3", {})]
)
def test_names_and_values_are_those_that_transformers_saves(tmp_path: Path, family: str, moe: dict[str, Any]) -> None:
    _, loaded = export(tiny_moe_llava(MoEConfig.model_validate(moe), family), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dense_model_is_plain_llava(tmp_path: Path) -> None:
    from moe_lvlm.models.upcycle import as_moe_llava

    plain = tiny_llava("phi3")
    form, loaded = export(as_moe_llava(plain), tmp_path / "dense")
    assert form.language_model == "Phi3Model"
    batch = collate(tiny_samples())
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, tiny_llava("phi3")(**batch).logits)


def test_scaled_rope_goes_over(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = tiny_moe_llava(MoEConfig()).config
    fields = config.to_dict()
    fields["text_config"] |= {"rope_parameters": scaling}
    form = stock_form(MoELlavaConfig.from_dict(fields))
    assert dict(form.config.text_config.rope_parameters) == dict(LlamaConfig(rope_parameters=scaling).rope_parameters)


@pytest.mark.parametrize(
    ("family", "fields", "moe", "reason"),
    [
        ("llama", {}, {"router": {"kind": "ltdr"}}, "--without-eea"),
        ("llama", {}, {"router": {"kind": "instruct"}}, "router instruct: .* allowed: top_k, ltdr, task, stgc"),
        ("llama", {}, {"router": {"kind": "top_k", "gate": {"kind": "cosine"}}}, "gate cosine"),
        ("llama", {}, {"capacity_factor": 1.5}, r"capacity_factor 1\.5"),
        ("llama", {"attention_bias": True}, {}, "attention_bias"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias"),
        ("phi", {}, {}, "head has a bias"),
        ("stablelm", {}, {}, "'stablelm'.*allowed: llama, mistral, phi3, qwen2, qwen3"),
        ("qwen3", {}, {"shared_experts": 1}, "shared experts"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}, "one kind of attention"),
    ],
)
def test_what_no_stock_class_computes(family: str, fields: dict[str, Any], moe: dict[str, Any], reason: str) -> None:
    config = tiny_llava(family, **fields).config.to_dict() | {"model_type": "moe_llava"}
    config |= {"moe": MoEConfig.model_validate(moe).to_dict(), "language_head_bias": family == "phi"}
    with pytest.raises(NoStockFormError, match=reason):
        stock_form(MoELlavaConfig.from_dict(config))


def test_an_ltdr_model_whose_tail_takes_no_more_is_stock() -> None:
    moe = MoEConfig.model_validate({"router": {"kind": "ltdr", "tail_k": 2}, "top_k": 2})
    assert stock_form(tiny_moe_llava(moe).config).language_model == "Qwen2MoeModel"


class CountingSource(LazySource):
    """Counts how often each row of a tensor is read."""

    def __init__(self, tensors: dict[str, LazyTensor]) -> None:
        super().__init__(tensors)
        self.reads: Counter[tuple[str, int]] = Counter()

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        rows = range(start or 0, self._tensor(name).num_rows if stop is None else stop)
        self.reads.update((name, row) for row in rows)
        return super().read(name, start, stop)


def test_experts_are_read_one_by_one_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe_llava(MoEConfig())
    form = stock_form(model.config)
    source = CountingSource(in_memory(model).tensors)
    monkeypatch.setattr("moe_lvlm.checkpoint.model_folder.CHUNK_BYTES", 512)  # several pieces a matrix
    write_model_folder(tmp_path / "stock", stock_source(model.config, form, source), documents={})
    assert set(source.reads.values()) == {1}
    assert {name for name, _ in source.reads} == set(model.state_dict())


def test_an_unknown_weight() -> None:
    model = tiny_moe_llava(MoEConfig())
    source = LazySource({"model.extra.weight": LazyTensor.of(torch.zeros(1))})
    with pytest.raises(ValueError, match=r"'model\.extra\.weight': belongs to none of"):
        stock_source(model.config, stock_form(model.config), source)
