"""Beside PEFT: a single LoRA, equal experts, experts that start from an adapter, experts as plain LoRAs."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from moe_lvlm.adapters import (
    LoRAExpertLinear,
    adapted_linears,
    attach,
    gate_table,
    merged_lora,
    start_adapters,
)
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from tests.adapters.problems import (
    FAMILIES,
    NUM_CLUSTERS,
    adapted_lm,
    decoder_of,
    dense_lm,
    mocle,
    rows_context,
    run,
    targets_of,
    words,
)

LENGTHS, SEQUENCE = [7, 4, 5, 6], 7
MERGED: dict[str, dict[str, Any]] = {
    "cluster": {},
    "no universal": {"has_universal": False},
    "top-2": {"has_universal": False, "top_k": 2},
    "dataset": {"gating": "dataset"},
    "rslora": {"rslora": True},
    "rslora top-2": {"rslora": True, "has_universal": False, "top_k": 2},
    "released": {"compat": "released"},
}


def peft_model(settings: LoRASettings, family: str = "llama", **fields: Any) -> peft.PeftModel:
    """PEFT's model around the same dense one, with A and B at random."""
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        target_modules=list(settings.target_modules),
        **fields,
    )
    model = peft.get_peft_model(dense_lm(family), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def logits_of(model: Any, *, is_ours: bool) -> Tensor:
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    mask = (context.sample_BS >= 0).long()
    output = run(model, ids, context)[0] if is_ours else model(input_ids=ids, attention_mask=mask)
    return output.logits[mask.bool()]


def started(settings: LoRASettings, family: str = "llama") -> PreTrainedModel:
    model = dense_lm(family)
    attach(decoder_of(model), settings)
    start_adapters(decoder_of(model), settings)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_a_single_lora_is_peft_s(tmp_path: Path, family: str, rslora: bool) -> None:
    settings = LoRASettings(rank=3, alpha=5.0, rslora=rslora, target_modules=targets_of(family))
    theirs = peft_model(settings, family)
    theirs.save_pretrained(tmp_path)
    ours = started(settings.model_copy(update={"start_from": str(tmp_path)}), family)
    expected = logits_of(theirs, is_ours=False)
    assert (expected - logits_of(dense_lm(family), is_ours=False)).abs().max() > 0.1
    assert_close(logits_of(ours, is_ours=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gating", ["cluster", "dataset", "sentence", "token"])
def test_equal_experts_with_a_universal_one_are_a_single_lora(tmp_path: Path, gating: str) -> None:
    """Whatever the gates are: G + (1 - G) = 1; also where alpha / r differs from the adapter's."""
    settings = mocle(gating=gating, alpha=11.0)
    theirs = peft_model(LoRASettings(rank=2, alpha=5.0))
    theirs.save_pretrained(tmp_path)
    ours = started(settings.model_copy(update={"start_from": str(tmp_path)}))
    gates = [linear.gate.weight for _, linear in adapted_linears(ours) if isinstance(linear, LoRAExpertLinear)]
    for weight in gates:
        weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert_close(logits_of(ours, is_ours=True), logits_of(theirs, is_ours=False), atol=1e-5, rtol=1e-5)


def test_dropout_and_gradients_are_peft_s() -> None:
    """One linear in training: the same mask for the same seed, and the same gradients."""
    settings = LoRASettings(rank=3, alpha=5.0, dropout=0.3, target_modules=("q_proj",))
    theirs = peft_model(settings, lora_dropout=0.3).train()
    ours = dense_lm()
    attach(decoder_of(ours), settings)
    _, linear = adapted_linears(ours)[0]
    reference = theirs.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        linear.lora_A.copy_(reference.lora_A["default"].weight[None])
        linear.lora_B.copy_(reference.lora_B["default"].weight[None])
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for module in (linear.train(), reference):
        inputs = x.clone().requires_grad_()
        torch.manual_seed(9)
        out = module(inputs)
        out.square().sum().backward()
        found.append((out, inputs.grad))
    assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert_close(linear.lora_A.grad[0], reference.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-4)
    assert_close(linear.lora_B.grad[0], reference.lora_B["default"].weight.grad, atol=1e-4, rtol=1e-4)


def as_peft(model: PreTrainedModel, dense: PreTrainedModel, row: int | None, folder: Path, rslora: bool) -> Any:
    """The dense model under PEFT, with the adapters of one row of the table, saved and loaded as files."""
    gates = gate_table(model) if row is not None else {}
    tensors, alphas, ranks = {}, set(), set()
    for name, linear in adapted_linears(model):
        merged = merged_lora(linear, gates[name][row] if row is not None else None)
        tensors[f"base_model.model.{name}.lora_A.weight"] = merged.A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = merged.B.contiguous()
        alphas.add(merged.alpha)
        ranks.add(merged.A.shape[0])
    (alpha,), (rank,) = alphas, ranks
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=[])
    config.target_modules = sorted({name.rpartition(".")[2] for name, _ in adapted_linears(model)})
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return peft.PeftModel.from_pretrained(copy.deepcopy(dense), folder).eval()


@pytest.mark.parametrize("fields", list(MERGED.values()), ids=list(MERGED))
@pytest.mark.parametrize("family", ["llama", "phi3", "stablelm_parallel", "opt"])
def test_a_row_of_the_table_is_a_plain_lora(tmp_path: Path, fields: dict[str, Any], family: str) -> None:
    settings = mocle(target_modules=targets_of(family), **fields)
    model, dense = adapted_lm(settings, family), dense_lm(family)
    ids = words(2)
    logits = []
    for row in range(NUM_CLUSTERS):
        theirs = as_peft(model, dense, row, tmp_path / str(row), settings.rslora)
        rows = torch.full((2,), row)
        context = replace(rows_context([SEQUENCE] * 2, SEQUENCE), cluster_N=rows, dataset_N=rows)
        ours = run(model, ids, context)[0].logits
        assert_close(theirs(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)
        logits.append(ours)
    rank = next(iter(adapted_linears(model)))[1].settings.rank
    saved = load_file(tmp_path / "0" / "adapter_model.safetensors")
    used = 2 if settings.has_universal else settings.top_k
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {used * rank}
    assert max((logits[0] - other).abs().max() for other in logits[1:]) > 0.01


def test_a_single_lora_is_itself(tmp_path: Path) -> None:
    model = adapted_lm(LoRASettings(rank=3, alpha=7.0))
    theirs = as_peft(model, dense_lm(), None, tmp_path, rslora=False)
    assert_close(theirs(input_ids=words()).logits, model(input_ids=words()).logits, atol=1e-5, rtol=1e-5)
    linear = adapted_linears(model)[0][1]
    with pytest.raises(ValueError, match="gates: a single LoRA has none"):
        merged_lora(linear, torch.ones(3))
    with pytest.raises(ValueError, match="a single LoRA has no gates"):
        gate_table(model)


def test_merged_by_hand() -> None:
    """Expert 1 with G = 0.75 and the universal one: A = [0.75 A_1; 0.25 A_u], B = [B_1, B_u], alpha doubled."""
    model = adapted_lm(mocle(rank=1, alpha=3.0, target_modules=("q_proj",)))
    _, linear = adapted_linears(model)[0]
    merged = merged_lora(linear, torch.tensor([0.0, 0.75, 0.0]))
    assert_close(merged.A, torch.stack((0.75 * linear.lora_A[1, 0], 0.25 * linear.lora_A[3, 0])))
    assert_close(merged.B, torch.stack((linear.lora_B[1, :, 0], linear.lora_B[3, :, 0]), dim=1))
    assert merged.alpha == 6.0
    for gates, said in (
        (None, r"gates: None; allowed: shape \(3,\)"),
        (torch.ones(4), r"gates: \(4,\); allowed: shape \(3,\)"),
        (torch.tensor([0.2, 0.8, 0.0]), r"holds more than top_k \(1\) numbers that are not 0"),
    ):
        with pytest.raises(ValueError, match=said):
            merged_lora(linear, gates)


@pytest.mark.parametrize("gating", ["sentence", "token"])
def test_gates_by_hidden_states_have_no_table(gating: str) -> None:
    with pytest.raises(ValueError, match=f"gating {gating} decides by hidden states"):
        gate_table(adapted_lm(mocle(gating=gating)))


def test_no_table_without_experts() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no LoRA experts"):
        gate_table(dense_lm())


def saved_adapter(folder: Path, **fields: Any) -> Path:
    peft_model(LoRASettings(rank=2), **fields).save_pretrained(folder)
    return folder


def start_from(folder: Path, **fields: Any) -> None:
    settings: MoCLESettings = mocle(start_from=str(folder), **fields)
    started(settings)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_adapters_that_nothing_can_start_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter.start_from: .*adapter_config.json cannot be read"):
        start_from(tmp_path / "nowhere")
    folder = saved_adapter(tmp_path / "saved")
    start_from(folder)
    for fields, said in (
        ({"rank": 4}, r"r: 2; allowed: adapter.rank \(4\)"),
        ({"target_modules": ("q_proj",)}, r"and no other; missing: \[\] \(0\), unexpected: \[.*v_proj"),
        ({"target_modules": ("q_proj", "v_proj", "o_proj")}, r"missing: \[.*o_proj.* \(6\), unexpected: \[\] \(0\)"),
        ({"target_modules": ("up_proj", "q_proj", "v_proj")}, r"missing: .*up_proj"),
        ({"target_modules": ("k_proj", "o_proj")}, r"holds no lora_A of layers.0.self_attn.k_proj"),
    ):
        with pytest.raises(ValueError, match=said):
            start_from(folder, **fields)
    for field, value in (("use_dora", True), ("peft_type", "LOHA"), ("rank_pattern", {"q_proj": 4}), ("bias", "all")):
        changed = saved_adapter(tmp_path / field)
        change_config(changed, **{field: value})
        with pytest.raises(ValueError, match=f"{field}: {re.escape(repr(value))}; allowed: .*, a plain LoRA"):
            start_from(changed)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(2, 31)}, weights)
    with pytest.raises(
        ValueError, match=r"lora_A of layers.0.self_attn.q_proj has shape \(2, 31\); allowed: \(2, 32\)"
    ):
        start_from(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not there; allowed: a folder that PEFT saved"):
        start_from(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON"):
        start_from(folder)
