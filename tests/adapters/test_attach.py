"""Adapters in whole language models: every family, dense and with experts; recompute, caches, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from moe_lvlm.adapters import LoRAExpertLinear, adapted_decoders, adapted_linears, attach, look_up, start_adapters
from moe_lvlm.config.adapter import LoRASettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.upcycle import moe_layers, upcycle_decoder
from moe_lvlm.routing import RoutingTrace, Site
from tests.adapters.problems import (
    FAMILIES,
    NUM_CLUSTERS,
    WIDTH,
    adapted_lm,
    decoder_of,
    dense_lm,
    mocle,
    plain_gates,
    plain_output,
    rows_context,
    run,
    shake_adapters,
    targets_of,
    words,
)

LENGTHS, SEQUENCE = [7, 4, 5, 6], 7
KINDS: dict[str, dict[str, Any]] = {
    "cluster": {},
    "dataset": {"gating": "dataset"},
    "sentence": {"gating": "sentence"},
    "token": {"gating": "token"},
    "top-2": {"gating": "sentence", "has_universal": False, "top_k": 2},
    "released": {"compat": "released"},
}
every_kind = pytest.mark.parametrize("fields", list(KINDS.values()), ids=list(KINDS))
every_family = pytest.mark.parametrize("family", FAMILIES)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@every_family
def test_at_the_start_the_model_is_the_dense_one(family: str) -> None:
    dense = dense_lm(family)
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    mask = (context.sample_BS >= 0).long()
    expected = dense(input_ids=ids, attention_mask=mask).logits
    names = set(dense.state_dict())
    for settings in (mocle(target_modules=targets_of(family)), LoRASettings(target_modules=targets_of(family))):
        model = copy.deepcopy(dense)
        wrapped = attach(decoder_of(model), settings)
        logits = run(model, ids, context)[0].logits
        assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
        assert names < set(model.state_dict())
        assert len(wrapped) == len(decoder_of(model).layers) * len(targets_of(family))
        shake_adapters(model)
        moved = run(model, ids, context)[0].logits
        assert (moved - expected)[mask.bool()].abs().max() > 0.1


@every_family
def test_each_linear_computes_the_paper_s_equations(family: str) -> None:
    """Inputs and outputs of every adapted linear, seen by hooks, beside the plain loop."""
    model = adapted_lm(mocle(target_modules=targets_of(family)), family)
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, given, out: seen.update({name: (given[0].detach(), out.detach())})

    handles = [linear.register_forward_hook(keep(name)) for name, linear in adapted_linears(model)]
    _, trace = run(model, ids, context)
    assert len(handles) == len(seen) == len(trace)
    table_RG = decoder_of(model).adapter_table.weight.detach().double()
    for name, linear in adapted_linears(model):
        assert isinstance(linear, LoRAExpertLinear)
        x_TI, out_TO = (value.reshape(-1, value.shape[-1]) for value in seen[name])
        decision = trace[linear.site]
        for sample in range(4):
            gates_E = plain_gates(linear.gate.weight.detach().double() @ table_RG[sample], linear.settings)
            assert int(decision.expert_ids_RK[sample, 0]) == int(gates_E.argmax())
            for token in (sample * SEQUENCE, sample * SEQUENCE + LENGTHS[sample] - 1):
                expected_O = plain_output(linear, x_TI[token], gates_E)
                assert_close(out_TO[token].double(), expected_O, atol=1e-4, rtol=1e-4)


def test_sites_and_names() -> None:
    model = adapted_lm(mocle(target_modules=("q_proj", "mlp.down_proj")))
    _, trace = run(model, words(), rows_context(LENGTHS, SEQUENCE))
    expected = [
        (f"model.layers.{layer}.{name}", Site(f"adapter.{name}", layer))
        for layer in range(3)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert [(name, linear.site) for name, linear in adapted_linears(model)] == expected
    assert {site for site, _ in trace.items()} == {site for _, site in expected}
    assert all(decision.level == "sample" for _, decision in trace.items())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    prefix = "model.layers.1.mlp.down_proj."
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)} == {
        "weight": (32, 48),
        "lora_A": (4, 2, 48),
        "lora_B": (4, 32, 2),
        "gate.weight": (3, WIDTH),
    }
    assert shapes["model.adapter_table.weight"] == (NUM_CLUSTERS, WIDTH)
    assert [name for name, _ in adapted_decoders(model)] == ["model"]


def test_a_regular_expression_names_some_layers() -> None:
    model = dense_lm()
    attach(decoder_of(model), mocle(target_modules=(r"re:layers\.[02]\..*\.(q|v)_proj", "layers.1.mlp.up_proj")))
    assert [name.removeprefix("model.layers.") for name, _ in adapted_linears(model)] == [
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.mlp.up_proj",
        "2.self_attn.q_proj",
        "2.self_attn.v_proj",
    ]


def test_hidden_states_are_still_recorded() -> None:
    model = adapted_lm(mocle())
    output, _ = run(model, words(), rows_context(LENGTHS, SEQUENCE), output_hidden_states=True)
    assert len(output.hidden_states) == 4


def test_meta_tensors() -> None:
    model = dense_lm().to("meta")
    attach(decoder_of(model), mocle(compat="released"))
    attached = dict(model.named_parameters())
    assert all(parameter.is_meta for parameter in attached.values())
    real = dense_lm()
    attach(decoder_of(real), mocle(compat="released"))
    assert {name: p.shape for name, p in real.named_parameters()} == {name: p.shape for name, p in attached.items()}


@every_kind
def test_recomputing_changes_no_gradient(fields: dict[str, Any]) -> None:
    """With noise and dropout of training; the table and the gates learn."""
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    found = []
    for is_checkpointed in (False, True):
        model = adapted_lm(mocle(dropout=0.2, target_modules=ALL, **fields)).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        output, _ = run(model, ids, context, use_cache=False)
        assert all(linear.facts is None for _, linear in adapted_linears(model))
        (output.logits.tanh() * (context.sample_BS >= 0)[..., None]).sum().backward()
        assert all(linear.facts is None for _, linear in adapted_linears(model))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    learned = {name for name, gradient in plain.items() if gradient.abs().sum() > 0}
    assert sum(name.endswith("gate.weight") for name in learned) == 21
    assert any(name.endswith("table.weight") for name in learned) == (
        "gating" not in fields or "dataset" in str(fields)
    )
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_is_refused() -> None:
    model = adapted_lm(mocle()).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True loses gradients of the adapters' table"):
        run(model, words(), rows_context(LENGTHS, SEQUENCE), use_cache=False)


def test_facts_are_gone_after_an_error() -> None:
    model = adapted_lm(mocle(gating="sentence"))
    context = replace(rows_context(LENGTHS, SEQUENCE), instruction_BS=None)
    with pytest.raises(ValueError, match="gating sentence"):
        run(model, words(), context)
    assert all(linear.facts is None for _, linear in adapted_linears(model))


def of_prompt(trace: RoutingTrace) -> dict[Site, Any]:
    return {site: decision.detach() for site, decision in trace.items() if decision.level == "sample"}


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: Tensor, lengths: list[int], *, is_cached: bool) -> tuple[Tensor, Tensor]:
    """Five greedy tokens after left-padded prompts, and their scores."""
    longest = prompt.shape[1]
    ids, tokens, scores = prompt, [], []
    cache, prompt_routing = DynamicCache(), None
    for step in range(5):
        context = rows_context([length + step for length in lengths], longest + step, left=True, num_instruction=2)
        mask = (context.sample_BS >= 0).long()
        given, options = ids, {"use_cache": False}
        if is_cached:
            options = {"past_key_values": cache, "use_cache": True}
        if is_cached and step:
            given = ids[:, -1:]
            context = replace(
                context,
                modality_BS=context.modality_BS[:, -1:],
                image_BS=context.image_BS[:, -1:],
                sample_BS=context.sample_BS[:, -1:],
                instruction_BS=torch.zeros(len(lengths), 1, dtype=torch.bool),
                cluster_N=None,
                dataset_N=None,
                prompt=prompt_routing,
            )
        output, trace = run(model, given, context, attention_mask=mask, **options)
        prompt_routing = of_prompt(trace)
        scores.append(output.logits[:, -1])
        tokens.append(output.logits[:, -1].argmax(dim=-1))
        ids = torch.cat((ids, tokens[-1][:, None]), dim=1)
    return torch.stack(tokens, dim=1), torch.stack(scores, dim=1)


@every_kind
def test_answers_with_and_without_a_cache(fields: dict[str, Any]) -> None:
    model = adapted_lm(mocle(target_modules=ALL, **fields))
    cached, cached_scores = answer(model, words(), LENGTHS, is_cached=True)
    plain, plain_scores = answer(model, words(), LENGTHS, is_cached=False)
    assert cached.tolist() == plain.tolist()
    assert_close(cached_scores, plain_scores, atol=1e-3, rtol=1e-4)
    assert len({tuple(row) for row in plain.tolist()}) > 1


@every_kind
@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_a_sample_does_not_depend_on_its_batch(fields: dict[str, Any], family: str) -> None:
    model = adapted_lm(mocle(target_modules=targets_of(family), **fields), family).train()
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    together = run(model, ids, context)[0].logits
    for row, length in enumerate(LENGTHS):
        alone = rows_context([length], length)
        alone = replace(
            alone,
            cluster_N=context.cluster_N[row : row + 1],
            dataset_N=context.dataset_N[row : row + 1],
            draw_N=context.draw_N[row : row + 1],
        )
        logits = run(model, ids[row : row + 1, :length], alone)[0].logits
        assert_close(logits[0], together[row, :length], atol=1e-4, rtol=1e-4)


def sparse_lm(**router: Any) -> PreTrainedModel:
    model = dense_lm()
    config = MoEConfig.model_validate({"num_experts": 2, "top_k": 1, "layers": "dense", "shared_experts": 1} | router)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upcycle_decoder(decoder_of(model), config)
    return model.eval()


def test_attention_and_shared_experts_beside_a_mixture_of_experts() -> None:
    """The mixture's router gets the same facts as before; linears of attention and shared experts are adapted."""
    context, ids = rows_context(LENGTHS, SEQUENCE), words()
    mask = context.sample_BS >= 0
    sparse = sparse_lm()
    expected, expected_trace = run(sparse, ids, context)
    wrapped = attach(decoder_of(sparse), mocle(target_modules=("q_proj", "shared_experts.0.up_proj")))
    output, trace = run(sparse, ids, context)
    assert_close(output.logits[mask], expected.logits[mask], atol=1e-5, rtol=1e-5)
    assert {site.part for site, _ in trace.items()} == {
        "language_model",
        "adapter.self_attn.q_proj",
        "adapter.mlp.shared_experts.0.up_proj",
    }
    assert len(wrapped) == 6
    assert len(moe_layers(sparse)) == 3
    for site, decision in expected_trace.items():
        assert torch.equal(trace[site].expert_ids_RK, decision.expert_ids_RK)
    shake_adapters(sparse)
    assert (run(sparse, ids, context)[0].logits - expected.logits)[mask].abs().max() > 0.1


def test_names_of_dense_ffns_are_refused_beside_stacked_experts() -> None:
    dense_between = dense_lm()
    upcycle_decoder(decoder_of(dense_between), MoEConfig.model_validate({"num_experts": 2, "layers": [1]}))
    for model, target, said in (
        (sparse_lm(shared_experts=0), "up_proj", "'up_proj' names no linear layer of the decoder's layers; there are"),
        (dense_between, "up_proj", "'up_proj' names no linear layer of decoder layers 1"),
        (dense_lm(), "w1", "'w1' names no linear layer of the decoder's layers; there are mlp.down_proj"),
    ):
        before = [type(layer) for layer in decoder_of(model).layers]
        with pytest.raises(ValueError, match=said) as raised:
            attach(decoder_of(model), mocle(target_modules=("q_proj", target)))
        is_sparse = bool(moe_layers(model))
        assert (
            "its FFN's linear layers are stacked matrices of mlp.experts (w1, w2, w3)" in str(raised.value)
        ) == is_sparse
        assert [type(layer) for layer in decoder_of(model).layers] == before
        assert not adapted_linears(model)
    attach(decoder_of(dense_between), mocle(target_modules=(r"re:.*\.up_proj",)))
    assert [linear.site.layer for _, linear in adapted_linears(dense_between)] == [0, 2]


def test_what_cannot_be_attached() -> None:
    model = dense_lm()
    decoder = decoder_of(model)
    with pytest.raises(ValueError, match=r"'qproj' names no linear layer of the decoder's layers; there are mlp.down"):
        attach(decoder, mocle(target_modules=("q_proj", "qproj")))
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression"):
        attach(decoder, mocle(target_modules=("re:(",)))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no decoder layers at `layers`"):
        attach(model, mocle())
    attach(decoder, mocle())
    with pytest.raises(ValueError, match="LlamaModel holds adapters already"):
        attach(decoder, LoRASettings())
    with pytest.raises(ValueError, match="cannot become sparse"):
        upcycle_decoder(decoder, MoEConfig(num_experts=2))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(ValueError, match="decoder layer Gemma2DecoderLayer cannot take adapters; allowed: Llama"):
        attach(decoder_of(gemma), mocle())
    assert not adapted_linears(gemma)


def test_rows_that_the_table_does_not_hold() -> None:
    model = adapted_lm(mocle())
    context = rows_context([3, 3], 3)
    for clusters, wrong in (([0, NUM_CLUSTERS], NUM_CLUSTERS), ([-1, 2], -1)):
        with pytest.raises(ValueError, match=f"gating cluster: cluster {wrong}; allowed: 0 to {NUM_CLUSTERS - 1}"):
            run(model, words(2, 3), replace(context, cluster_N=torch.tensor(clusters)))
    with pytest.raises(ValueError, match="gating cluster: the instructions' clusters are not known"):
        run(model, words(2, 3), replace(context, cluster_N=None))
    by_dataset = adapted_lm(mocle(gating="dataset"))
    with pytest.raises(ValueError, match="gating dataset: the samples' datasets are not known"):
        run(by_dataset, words(2, 3), replace(context, dataset_N=None))
    with pytest.raises(ValueError, match=r"holds no embeddings; allowed: adapters\.look_up"):
        model(input_ids=words(2, 3))


def test_looking_up() -> None:
    model = adapted_lm(mocle())
    context = rows_context([3, 3, 3], 3)
    found = look_up(decoder_of(model), replace(context, cluster_N=torch.tensor([4, 0, 4]), num_samples=None))
    assert torch.equal(found.embedding_NG, decoder_of(model).adapter_table.weight[[4, 0, 4]])
    assert (found.num_samples, found.is_packed) == (3, False)
    packed = replace(context, sample_BS=torch.tensor([[0, 0, 1], [2, 2, -1], [-1, -1, -1]]), num_samples=None)
    assert look_up(decoder_of(model), packed).is_packed
    nobody = replace(context, sample_BS=torch.full((3, 3), -1), num_samples=None)
    assert look_up(decoder_of(model), nobody).embedding_NG.shape == (1, WIDTH)
    dense = dense_lm()
    assert look_up(decoder_of(dense), context) is context
    moved = found.to("meta")
    assert moved.embedding_NG.is_meta
    assert moved.dataset_N.is_meta


def test_a_single_lora_needs_no_context() -> None:
    model = adapted_lm(LoRASettings(rank=2))
    ids = words()
    assert_close(model(input_ids=ids).logits, run(model, ids, rows_context([7] * 4, 7))[0].logits)
    assert len(run(model, ids, rows_context([7] * 4, 7))[1]) == 0


def test_start_draws_as_peft_does() -> None:
    """A uniform within 1 / sqrt(inputs) (Kaiming's with a = sqrt(5)), experts apart; B 0; gates of 0.02."""
    model = adapted_lm(mocle(rank=8))
    centres_KG = torch.randn(NUM_CLUSTERS - 1, WIDTH)
    torch.manual_seed(0)
    start_adapters(decoder_of(model), mocle(rank=8), centres_KG=centres_KG)
    linears = [linear for _, linear in adapted_linears(model)]
    a = torch.stack([linear.lora_A for linear in linears])
    assert a.abs().max() <= 32**-0.5
    assert abs(a.std() / (32**-0.5 / 3**0.5) - 1) < 0.05
    assert len({tuple(row) for row in a.flatten(0, 2).tolist()}) == a[..., 0].numel()
    assert all(not linear.lora_B.any() for linear in linears)
    gates = torch.stack([linear.gate.weight for linear in linears])
    assert abs(gates.std() / 0.02 - 1) < 0.2
    table = decoder_of(model).adapter_table.weight
    assert torch.equal(table[:-1], centres_KG)
    assert not table[-1].any()
    start_adapters(decoder_of(model), mocle(rank=8))
    assert 0.6 < table.detach().norm(dim=1).mean() < 1.4


def test_every_table_starts_at_the_centres() -> None:
    released = dense_lm()
    attach(decoder_of(released), mocle(compat="released"))
    centres_KG = torch.randn(NUM_CLUSTERS, WIDTH)
    start_adapters(decoder_of(released), mocle(compat="released"), centres_KG=centres_KG)
    tables = [linear.table for _, linear in adapted_linears(released)]
    assert len(tables) == 6
    assert all(torch.equal(table.weight, centres_KG) for table in tables)
    assert "adapter_table.weight" not in decoder_of(released).state_dict()
    for wrong, said in (
        (torch.randn(NUM_CLUSTERS + 1, WIDTH), "adapter.num_clusters: 5, but data.clusters holds 6 clusters"),
        (torch.randn(NUM_CLUSTERS, 2), "adapter.embedding_width: 6, but the centres of data.clusters are 2 wide"),
    ):
        with pytest.raises(ValueError, match=said):
            start_adapters(decoder_of(released), mocle(compat="released"), centres_KG=wrong)


def test_a_linear_without_samples_gets_its_gradient_on_every_rank() -> None:
    """A batch of padding calls and moves the same parameters as any other (ranks reduce the same buckets)."""
    found = []
    for context in (rows_context(LENGTHS, SEQUENCE), replace(rows_context([0] * 4, SEQUENCE), num_samples=0)):
        model = adapted_lm(mocle()).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or ".gate." in name or "table" in name)
        output, _ = run(model, words(), context, attention_mask=torch.ones(4, SEQUENCE))
        output.logits.sum().backward()
        found.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0] == found[1]
    assert len(found[0]) == 6 * 3 + 1


def test_nothing_is_frozen_or_thawed() -> None:
    model = dense_lm().requires_grad_(False)
    attach(decoder_of(model), mocle())
    learning = {
        name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".gate." not in name
    }
    assert learning == {"lora_A", "lora_B", "weight"}
    assert isinstance(decoder_of(model).adapter_table, nn.Embedding)
