"""Adapters on the stacked matrices of experts in whole models, and over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from moe_lvlm.adapters import adapted_linears, attach, gate_table, look_up, merged_lora, start_adapters
from moe_lvlm.adapters.linear import GatedAdapter
from moe_lvlm.adapters.names import adapter_parameters
from moe_lvlm.adapters.stacked import StackedLoRA
from moe_lvlm.config.adapter import LoRASettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.types import ExpertSlice
from moe_lvlm.moe.upcycle import moe_layers, upcycle_decoder
from moe_lvlm.routing import Site
from tests.adapters.problems import (
    NUM_CLUSTERS,
    WIDTH,
    decoder_of,
    dense_lm,
    mocle,
    rows_context,
    run,
    shake_adapters,
    words,
)
from tests.adapters.stacked_problems import (
    KINDS,
    LENGTHS,
    SEQUENCE,
    STACKS,
    E,
    make_layer,
)
from tests.adapters.stacked_ranks import Case, build, solve, train
from tests.parallel.problems import NUM_EXPERTS, Outcome
from tests.parallel.rank_server import RankServer


def sparse_lm(family: str = "llama", **moe: Any) -> PreTrainedModel:
    model = dense_lm(family)
    config = {"num_experts": 3, "top_k": 2, "layers": "dense", "router": {"kind": "top_k"}} | moe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upcycle_decoder(decoder_of(model), MoEConfig.model_validate(config))
    # experts that differ
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    return model.eval()


def adapted_sparse_lm(settings: LoRASettings, family: str = "llama", **moe: Any) -> PreTrainedModel:
    model = sparse_lm(family, **moe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attach(decoder_of(model), settings)
    shake_adapters(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "stacks"),
    [("llama", STACKS), ("qwen2", STACKS), ("phi3", STACKS), ("phi", ("w1", "w2")), ("stablelm", STACKS)],
)
@pytest.mark.parametrize("kind", ["cluster", "token", "lora"])
def test_at_the_start_the_model_is_the_same_bit_for_bit(
    kind: str, family: str, stacks: tuple[str, ...], dtype: torch.dtype
) -> None:
    sparse = sparse_lm(family).to(dtype)
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    expected, expected_trace = run(sparse, ids, context)
    settings = KINDS[kind].model_copy(update={"target_modules": stacks})
    adapted = attach(decoder_of(sparse), settings)
    assert [adapter.site for adapter in adapted] == [
        Site(f"adapter.mlp.experts.{name}", layer) for layer in range(3) for name in stacks
    ]
    assert all(adapter.lora_A.dtype == dtype for adapter in adapted)
    output, trace = run(sparse, ids, context)
    assert torch.equal(output.logits, expected.logits)
    for site, decision in expected_trace.items():
        assert torch.equal(trace[site].expert_ids_RK, decision.expert_ids_RK)
    shake_adapters(sparse)
    moved = run(sparse, ids, context)[0].logits - expected.logits
    assert moved[context.sample_BS >= 0].abs().max() > 0.05


def test_names_and_shapes() -> None:
    sparse = sparse_lm()
    before = {name: tuple(parameter.shape) for name, parameter in sparse.named_parameters()}
    attach(decoder_of(sparse), mocle(target_modules=("q_proj", "experts.w2", "mlp.experts.w1")))
    names = [name for name, _ in adapted_linears(sparse)]
    assert names[:3] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.adapters.w1",
        "model.layers.0.mlp.adapters.w2",
    ]
    shapes = {name: tuple(parameter.shape) for name, parameter in sparse.named_parameters()}
    prefix = "model.layers.1.mlp.adapters."
    new = {name: shape for name, shape in shapes.items() if name not in before}
    assert {name.removeprefix(prefix): shape for name, shape in new.items() if name.startswith(prefix)} == {
        "w1.lora_A": (3, 4, 2, 32),
        "w1.lora_B": (3, 4, 48, 2),
        "w1.gate.weight": (3, WIDTH),
        "w2.lora_A": (3, 4, 2, 48),
        "w2.lora_B": (3, 4, 32, 2),
        "w2.gate.weight": (3, WIDTH),
    }
    assert {name: shapes[name] for name in before} == before
    assert adapter_parameters(sparse) == new.keys()
    by_token = sparse_lm()
    attach(decoder_of(by_token), mocle(target_modules=("w2",), gating="token"))
    assert {tuple(one.gate.weight.shape) for _, one in adapted_linears(by_token) if isinstance(one, GatedAdapter)} == {
        (3, 32)
    }


def test_sparse_layers_between_dense_ones() -> None:
    """Experts are adapted where there are any; beside linears of dense layers by a regular expression."""
    model = sparse_lm(layers=[0, 2])
    assert [one.site.layer for one in attach(decoder_of(model), mocle(target_modules=("w1",)))] == [0, 2]
    model = sparse_lm(layers=[1])
    attach(decoder_of(model), mocle(target_modules=(r"re:.*\.(down_proj|w2)",)))
    assert [type(one).__name__ for _, one in adapted_linears(model)] == [
        "LoRAExpertLinear",
        "StackedLoRAExperts",
        "LoRAExpertLinear",
    ]
    shake_adapters(model)
    _, trace = run(model, words(), rows_context(LENGTHS, SEQUENCE))
    assert {site for site, _ in trace.items() if site.part != "language_model"} == {
        Site("adapter.mlp.down_proj", 0),
        Site("adapter.mlp.experts.w2", 1),
        Site("adapter.mlp.down_proj", 2),
    }


def test_meta_tensors_and_start() -> None:
    """A as PEFT draws it, each pair by itself; B 0."""
    model = sparse_lm().to("meta")
    settings = mocle(target_modules=STACKS, rank=8, compat="released")
    attach(decoder_of(model), settings)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    start_adapters(decoder_of(model), settings)
    for name, adapter in adapted_linears(model):
        bound = adapter.lora_A.shape[-1] ** -0.5
        assert adapter.lora_A.abs().max() <= bound, name
        assert abs(adapter.lora_A.std() / (bound / 3**0.5) - 1) < 0.1, name
        assert len({tuple(row) for row in adapter.lora_A.flatten(0, 2).tolist()}) == adapter.lora_A[..., 0].numel()
        assert not adapter.lora_B.any()
        assert torch.isfinite(adapter.gate.weight).all()
        assert torch.isfinite(adapter.table.weight).all()


def test_the_draw_does_not_depend_on_how_experts_are_spread() -> None:
    """A process that holds experts 1 and 2 of four draws what one that holds all four gives them, gates too."""
    whole, part = make_layer(mocle()), make_layer(mocle())
    for _, adapter in adapted_linears(part):
        for name in ("lora_A", "lora_B"):
            share = nn.Parameter(getattr(adapter, name).detach()[1:3].clone())
            share.expert_slice = ExpertSlice(1, 3, E)
            setattr(adapter, name, share)
    for layer in (whole, part):
        torch.manual_seed(4)
        for _, adapter in adapted_linears(layer):
            adapter.reset_adapter()
    for name in STACKS:
        assert torch.equal(part.adapters[name].lora_A, whole.adapters[name].lora_A[1:3])
        assert torch.equal(part.adapters[name].gate.weight, whole.adapters[name].gate.weight)
        assert not part.adapters[name].lora_B.any()


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_tables_start_at_the_centres(compat: str) -> None:
    """Also where nothing but stacks is adapted."""
    model, settings = sparse_lm(), mocle(target_modules=STACKS, compat=compat)
    attach(decoder_of(model), settings)
    centres_KG = torch.randn(NUM_CLUSTERS, WIDTH)
    start_adapters(decoder_of(model), settings, centres_KG=centres_KG)
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith("table.weight")]
    assert len(tables) == (1 if compat == "paper" else 9)
    assert all(torch.equal(table, centres_KG) for table in tables)


def test_no_start_from_peft(tmp_path: Path) -> None:
    settings = mocle(target_modules=("q_proj", "w2"), start_from=str(tmp_path))
    model = adapted_sparse_lm(settings)
    with pytest.raises(
        ValueError, match=r"adapter\.start_from: .*layers\.0\.mlp\.adapters\.w2 adapts the stacked matrices"
    ):
        start_adapters(decoder_of(model), settings)


def test_what_is_no_plain_lora() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.adapters\.w2: an adapter on the stacked experts of a mixture"
    ):
        gate_table(adapted_sparse_lm(mocle(target_modules=("q_proj", "w2"))))
    for settings, gates_E in (
        (mocle(target_modules=("w2",)), torch.eye(3)[0]),
        (LoRASettings(target_modules=("w2",)), None),
    ):
        _, stacked = adapted_linears(adapted_sparse_lm(settings))[-1]
        with pytest.raises(ValueError, match=r"mlp\.experts\.w2: an adapter on the stacked experts of a mixture"):
            merged_lora(stacked, gates_E)


@pytest.mark.parametrize("kind", ["cluster", "sentence", "token", "top-2", "released", "lora"])
def test_recomputing_changes_no_gradient(kind: str) -> None:
    """With noise and dropout of training."""
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    settings = KINDS[kind].model_copy(update={"target_modules": ("q_proj", *STACKS), "dropout": 0.2})
    found = []
    for is_checkpointed in (False, True):
        model = adapted_sparse_lm(settings).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        output, _ = run(model, ids, context, use_cache=False)
        (output.logits.tanh() * (context.sample_BS >= 0)[..., None]).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    learned = {name for name, gradient in plain.items() if gradient.any()}
    assert adapter_parameters(model) <= learned
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_of_padding_moves_the_same_parameters() -> None:
    """Ranks reduce the same buckets, whatever their batch holds."""
    found = []
    for context in (rows_context(LENGTHS, SEQUENCE), replace(rows_context([0] * 4, SEQUENCE), num_samples=0)):
        model = adapted_sparse_lm(mocle(target_modules=STACKS)).train()
        trained = adapter_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        output, _ = run(model, words(), context, attention_mask=torch.ones(4, SEQUENCE))
        output.logits.sum().backward()
        found.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert found[-1] == trained
    assert len(found[0]) == 9 * 3 + 1


def test_what_was_decided_at_the_prompt_holds() -> None:
    """A later call needs neither clusters nor a table, and goes the same way."""
    model = adapted_sparse_lm(mocle(target_modules=STACKS))
    context, ids = rows_context([7] * 4, SEQUENCE), words()
    whole, trace = run(model, ids, context)
    decided = {site: decision.detach() for site, decision in trace.items() if decision.level == "sample"}
    assert len(decided) == 9
    first = replace(
        context,
        modality_BS=context.modality_BS[:, :5],
        image_BS=context.image_BS[:, :5],
        sample_BS=context.sample_BS[:, :5],
        instruction_BS=context.instruction_BS[:, :5],
    )
    output, _ = run(model, ids[:, :5], first, use_cache=True)
    later = replace(
        context,
        modality_BS=context.modality_BS[:, 5:],
        image_BS=context.image_BS[:, 5:],
        sample_BS=context.sample_BS[:, 5:],
        instruction_BS=None,
        cluster_N=None,
        prompt=decided,
    )
    cache = output.past_key_values
    after, _ = run(model, ids[:, 5:], later, past_key_values=cache, attention_mask=torch.ones(4, SEQUENCE))
    assert_close(after.logits, whole.logits[:, 5:], atol=1e-4, rtol=1e-4)


def test_a_single_lora_needs_no_context() -> None:
    model = adapted_sparse_lm(LoRASettings(rank=2, target_modules=STACKS))
    assert all(isinstance(one, StackedLoRA) for _, one in adapted_linears(model))
    ids = words()
    together, trace = run(model, ids, rows_context([7] * 4, 7))
    assert_close(model(input_ids=ids).logits, together.logits)
    assert {site.part for site, _ in trace.items()} == {"language_model"}


def test_experts_that_cannot_be_adapted() -> None:
    compared = sparse_lm(router={"kind": "stgc"})
    with pytest.raises(
        ValueError, match=r"the experts of layer 0 have a router of kind stgc, which compares gradients"
    ):
        attach(decoder_of(compared), mocle(target_modules=("q_proj", "w2")))
    assert not adapted_linears(compared)
    attach(decoder_of(compared), mocle())
    phi = sparse_lm("phi")
    with pytest.raises(ValueError, match=r"'w3' names no linear layer .*mlp\.experts\.w1, mlp\.experts\.w2, self_attn"):
        attach(decoder_of(phi), mocle(target_modules=("w3",)))


def test_experts_keep_what_they_held() -> None:
    """Experts are as before for all that reads them: conversion, upcycling, statistics."""
    model = sparse_lm()
    before = [[name for name, _ in layer.experts.named_parameters()] for _, layer in moe_layers(model)]
    attach(decoder_of(model), mocle(target_modules=STACKS))
    assert [[name for name, _ in layer.experts.named_parameters()] for _, layer in moe_layers(model)] == before
    context = look_up(decoder_of(model), rows_context(LENGTHS, SEQUENCE))
    assert context.embedding_NG is not None


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


SPREAD = {
    "zero 2": Case(),
    "zero 3": Case(zero=3),
    "token": Case(kind="token", zero=3),
    "a rank has only padding": Case(layout="padding only", zero=3),
    "a rank's experts get nothing": Case(is_starved=True, zero=3),
    "experts are trained too": Case(train=("adapter", "moe"), zero=2),
}
MORE_SPREAD = {
    "zero 1": Case(zero=1),
    "not spread": Case(zero=3, expert_parallel_size=1),
    "sentence": Case(kind="sentence"),
    "lora": Case(kind="lora"),
    "checkpointing": Case(zero=3, has_checkpointing=True),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in SPREAD.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE_SPREAD.items()),
    ],
)
def test_ranks_equal_a_plain_loop(ranks: RankServer, tmp_path: Path, case: Case) -> None:
    """Losses, norms and parameters of three steps; each rank has the adapters of its experts, and all the gates."""
    plain = solve(replace(case, world=1, zero=0, expert_parallel_size=1, has_checkpointing=False))
    start = dict(build(case).named_parameters())
    trained = {name for name, parameter in start.items() if parameter.requires_grad}
    moved = {name for name in trained if (plain.parameters[name] - start[name]).abs().max() > 1e-4}
    assert moved == trained
    assert any(".mlp.adapters.w1.lora_A" in name for name in trained)
    for rank, result in enumerate(ranks.run(train, case, world=case.world, folder=tmp_path)):
        outcome = Outcome.of(result)
        assert_close(outcome.losses, plain.losses, rtol=1e-6, atol=1e-6)
        assert_close(outcome.norms, plain.norms, rtol=1e-5, atol=0)
        assert outcome.parameters.keys() == plain.parameters.keys()
        for name, parameter in outcome.parameters.items():
            expected = plain.parameters[name]
            if ".mlp.experts." in name or (".mlp.adapters." in name and ".lora_" in name):
                held = NUM_EXPERTS // case.expert_parallel_size
                first = rank % case.expert_parallel_size * held
                expected = expected[first : first + held]
            assert parameter.shape == expected.shape, name
            assert_close(parameter, expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
