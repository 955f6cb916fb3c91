"""One linear with LoRA experts: gates and outputs by hand and beside a plain loop, for every gating.

N samples   E experts   I inputs of the linear
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe_lvlm.adapters.facts import BatchFacts
from moe_lvlm.adapters.linear import LoRAExpertLinear, LoRALinear
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.routing import RoutingContext, RoutingDecision, RoutingTrace, Site
from moe_lvlm.routing.noise import sample_noise
from tests.adapters.problems import WIDTH, mocle, plain_gates, plain_output, rows_context, shake_adapters, with_table

INPUTS, OUTPUTS = 8, 5
SITE = Site("adapter.self_attn.q_proj", 3)
LENGTHS, SEQUENCE = [7, 3, 5, 6], 7
SETTINGS: dict[str, dict[str, Any]] = {
    "cluster": {},
    "no universal": {"has_universal": False},
    "top-2": {"has_universal": False, "top_k": 2},
    "top-3": {"has_universal": False, "top_k": 3},
    "dataset": {"gating": "dataset"},
    "sentence": {"gating": "sentence"},
    "sentence top-2": {"gating": "sentence", "has_universal": False, "top_k": 2},
    "token": {"gating": "token"},
    "token top-2": {"gating": "token", "has_universal": False, "top_k": 2},
    "rslora": {"rslora": True},
    "released": {"compat": "released"},
    "released top-2": {"compat": "released", "has_universal": False, "top_k": 2},
    "one expert": {"num_experts": 1},
}
every_setting = pytest.mark.parametrize("fields", list(SETTINGS.values()), ids=list(SETTINGS))


def expert_linear(settings: MoCLESettings, *, seed: int = 0) -> LoRAExpertLinear:
    """A linear with a bias, float32, whose adapter does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = LoRAExpertLinear(nn.Linear(INPUTS, OUTPUTS), settings, SITE)
    shake_adapters(linear, seed=seed)
    return linear.eval()


def inputs(context: RoutingContext, *, seed: int = 0) -> Tensor:
    shape = (*context.sample_BS.shape, INPUTS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embeddings(num_rows: int, *, seed: int = 7) -> Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@contextmanager
def told(linear: LoRAExpertLinear, context: RoutingContext, trace: RoutingTrace | None = None) -> Iterator[None]:
    linear.facts = BatchFacts(context, trace)
    yield
    linear.facts = None


def call(linear: LoRAExpertLinear, x: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
    trace = RoutingTrace(context)
    with told(linear, context, trace):
        out = linear(x)
    return out, trace[SITE]


def plain_described(linear: LoRAExpertLinear, x_BSI: Tensor, context: RoutingContext) -> dict[tuple[int, int], Tensor]:
    """What the gate reads for each token, [G], by place; padding is left out."""
    found = {}
    gating = linear.settings.gating
    for row, column in (context.sample_BS >= 0).nonzero().tolist():
        sample = int(context.sample_BS[row, column])
        if gating == "token":
            read = x_BSI[row, column]
        elif gating == "sentence":
            is_read = (context.sample_BS == sample) & context.instruction_BS
            read = x_BSI[is_read].double().mean(dim=0)
        elif linear.table is not None:
            read = linear.table.weight[context.cluster_N[sample]]
        else:
            read = context.embedding_NG[sample]
        found[row, column] = read.detach().double()
    return found


def plain_scores(linear: LoRAExpertLinear, read_G: Tensor) -> Tensor:
    scores_E = linear.gate.weight.detach().double() @ read_G
    return scores_E + linear.gate.bias.detach().double() if hasattr(linear.gate, "bias") else scores_E


def assert_equals_plain_loop(linear: LoRAExpertLinear, x_BSI: Tensor, context: RoutingContext) -> None:
    out_BSO, decision = call(linear, x_BSI, context)
    assert torch.isfinite(out_BSO).all()
    by_token = decision.by_token(context)
    for (row, column), read_G in plain_described(linear, x_BSI, context).items():
        gates_E = plain_gates(plain_scores(linear, read_G), linear.settings)
        expected_O = plain_output(linear, x_BSI[row, column], gates_E)
        assert_close(out_BSO[row, column].double(), expected_O, atol=2e-5, rtol=2e-5)
        token = row * context.sample_BS.shape[1] + column
        recorded_E = torch.zeros(linear.settings.num_experts)
        recorded_E[by_token.expert_ids_RK[token]] = by_token.weights_RK[token]
        assert_close(recorded_E.double(), gates_E, atol=1e-5, rtol=1e-5)
    assert len({tuple(ids) for ids in decision.expert_ids_RK.tolist()}) > 1 or linear.settings.num_experts == 1


@every_setting
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_equals_the_plain_loop(fields: dict[str, Any], left: bool) -> None:
    context = with_table(rows_context(LENGTHS, SEQUENCE, left=left), embeddings(4))
    linear = expert_linear(mocle(**fields), seed=1)
    assert_equals_plain_loop(linear, inputs(context), context)


def packed_context() -> RoutingContext:
    """Three samples: two in the first row, one in the second, which ends in padding; a third row is all padding."""
    sample_BS = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, -1, -1], [-1] * 5], dtype=torch.int32)
    instruction_BS = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5]).bool()
    return replace(
        with_table(rows_context([5, 5, 5], 5), embeddings(3, seed=2)),
        sample_BS=sample_BS,
        modality_BS=(sample_BS >= 0).to(torch.int8),
        instruction_BS=instruction_BS,
    )


@every_setting
def test_samples_packed_into_a_row(fields: dict[str, Any]) -> None:
    context = packed_context()
    assert_equals_plain_loop(expert_linear(mocle(**fields), seed=2), inputs(context), context)


@every_setting
def test_packing_changes_no_gradient(fields: dict[str, Any]) -> None:
    """The same tokens of the same samples, a row each, give the same gradients of all parameters and of the table."""
    packed = packed_context()
    unpacked = with_table(rows_context([3, 2, 3], 3), packed.embedding_NG)
    instruction_BS = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0]]).bool()
    unpacked = replace(unpacked, instruction_BS=instruction_BS, cluster_N=packed.cluster_N)
    x_packed = inputs(packed)
    x_rows = torch.zeros(3, 3, INPUTS)
    for sample, length in enumerate([3, 2, 3]):
        x_rows[sample, :length] = x_packed[packed.sample_BS == sample]
    found = []
    for context, x in ((packed, x_packed), (unpacked, x_rows)):
        linear = expert_linear(mocle(**fields), seed=5).train()
        table = context.embedding_NG.clone().requires_grad_()
        x = x.clone().requires_grad_()
        out, _ = call(linear, x, with_table(context, table))
        (out.tanh() * (context.sample_BS >= 0)[..., None]).sum().backward()
        gradients = {name: parameter.grad for name, parameter in linear.named_parameters()}
        by_sample = torch.cat([x.grad[context.sample_BS == sample] for sample in range(3)])
        found.append(gradients | {"x": by_sample, "table": table.grad})
    assert found[0]["lora_A"].abs().sum() > 0
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_gate_by_hand() -> None:
    """Two experts, tau 0.5, W the identity, C = (0.5, 0.1): softmax(1, 0.2) = (0.68997, 0.31003)."""
    settings = mocle(num_experts=2, embedding_width=2, temperature=0.5, rank=1, alpha=2.0)
    linear = LoRAExpertLinear(nn.Linear(2, 1, bias=False), settings, SITE).eval()
    with torch.no_grad():
        linear.gate.weight.copy_(torch.eye(2))
        linear.weight.copy_(torch.tensor([[1.0, 10.0]]))
        linear.lora_A.copy_(torch.tensor([[[1.0, 0.0]], [[5.0, 5.0]], [[0.0, 1.0]]]))
        linear.lora_B.copy_(torch.tensor([[[3.0]], [[7.0]], [[100.0]]]))
    context = with_table(rows_context([1], 1), torch.tensor([[0.5, 0.1]]))
    out, decision = call(linear, torch.tensor([[[2.0, 1.0]]]), context)
    # W x = 12; expert 0: 3 x 2; universal: 100 x 1; alpha / r = 2
    gate = 0.6899744811276125
    assert decision.level == "sample"
    assert_close(decision.probs_RE, torch.tensor([[gate, 1 - gate]]))
    assert decision.expert_ids_RK.tolist() == [[0]]
    assert_close(decision.weights_RK, torch.tensor([[gate]]))
    assert_close(out, torch.tensor([[[12 + 2 * (gate * 6 + (1 - gate) * 100)]]]))


def test_equal_scores_take_the_lowest_expert() -> None:
    linear = expert_linear(mocle())
    with torch.no_grad():
        linear.gate.weight.zero_()
    context = with_table(rows_context([2], 2), embeddings(1))
    _, decision = call(linear, inputs(context), context)
    assert decision.expert_ids_RK.tolist() == [[0]]
    assert_close(decision.weights_RK, torch.tensor([[1 / 3]]))


def test_released_softmax_is_in_the_type_of_the_weights() -> None:
    context = with_table(rows_context([3, 3], 3), embeddings(2).bfloat16())
    x = inputs(context).bfloat16()
    for compat, is_rounded in (("released", True), ("paper", False)):
        linear = expert_linear(mocle(compat=compat)).bfloat16()
        _, decision = call(linear, x, context)
        assert decision.probs_RE.dtype == torch.float32
        assert torch.equal(decision.probs_RE, decision.probs_RE.bfloat16().float()) == is_rounded


def training_noise(linear: LoRAExpertLinear, x: Tensor, context: RoutingContext) -> Tensor:
    """The difference that training makes to scores."""
    _, quiet = call(linear.eval(), x, context)
    _, noisy = call(linear.train(), x, context)
    return (noisy.logits_RE - quiet.logits_RE) * linear.settings.temperature


@pytest.mark.parametrize(("fields", "std"), [({}, 3**-0.5), ({"noise": 0.2}, 0.2), ({"compat": "released"}, 0.1)])
def test_noise_of_a_sample(fields: dict[str, Any], std: float) -> None:
    """Added before the temperature, with the standard deviation that the paper, the settings or the released code say;
    the same for a sample wherever it stands, another in another linear."""
    lengths = [2] * 400
    context = with_table(rows_context(lengths, 2), embeddings(400))
    linear, x = expert_linear(mocle(**fields)), inputs(context)
    noise_NE = training_noise(linear, x, context)
    assert abs(noise_NE.std() / std - 1) < 0.1
    turned = replace(
        context,
        cluster_N=context.cluster_N.flip(0),
        draw_N=context.draw_N.flip(0),
        embedding_NG=context.embedding_NG.flip(0),
    )
    assert_close(training_noise(linear, x, turned), noise_NE.flip(0), atol=1e-5, rtol=0)
    for site in (Site("adapter.self_attn.v_proj", 3), Site("adapter.self_attn.q_proj", 4)):
        linear.site = site
        with told(linear, context):
            other = linear._noise(BatchFacts(context, None))
        assert abs(torch.corrcoef(torch.stack((other.flatten(), noise_NE.flatten())))[0, 1]) < 0.15
    # and not the noise that a connector's layer of this or another low number draws
    connectors = [sample_noise(context.draw_N, layer=layer, num_experts=3, std=std) for layer in range(12)]
    assert all(not torch.allclose(noise, noise_NE, atol=1e-3) for noise in connectors)


def test_noise_of_a_token_is_its_place_in_the_sample() -> None:
    linear = expert_linear(mocle(gating="token"))
    context = rows_context([4, 2], 4)
    noise_TE = training_noise(linear, inputs(context), context)
    left = rows_context([4, 2], 6, left=True)
    noise_left_TE = training_noise(linear, inputs(left), left)
    for wide, narrow in ((2, 0), (3, 1), (4, 2), (5, 3), (10, 4), (11, 5)):
        assert_close(noise_left_TE[wide], noise_TE[narrow], atol=1e-5, rtol=0)
    assert len({round(value, 4) for value in noise_TE[[0, 1, 2, 3, 4, 5]].flatten().tolist()}) == 18


def test_no_noise_outside_training_or_without_it() -> None:
    context = with_table(rows_context([2, 2], 2), embeddings(2))
    for linear in (expert_linear(mocle()).eval(), expert_linear(mocle(noise=0.0)).train()):
        _, decision = call(linear, inputs(context), replace(context, draw_N=None))
        scores_NE = context.embedding_NG @ linear.gate.weight.detach().t()
        assert_close(decision.logits_RE, scores_NE / 0.7)


@every_setting
def test_a_sample_does_not_depend_on_its_batch(fields: dict[str, Any]) -> None:
    """Alone, beside others and with more padding: the same output, noise of training and all."""
    linear = expert_linear(mocle(**fields)).train()
    context = with_table(rows_context(LENGTHS, SEQUENCE), embeddings(4))
    x_BSI = inputs(context)
    together, _ = call(linear, x_BSI, context)
    for row, length in enumerate(LENGTHS):
        alone = rows_context([length], SEQUENCE + 2)
        alone = replace(
            with_table(alone, context.embedding_NG[row : row + 1]),
            cluster_N=context.cluster_N[row : row + 1],
            draw_N=context.draw_N[row : row + 1],
        )
        x = torch.zeros(1, SEQUENCE + 2, INPUTS)
        x[0, :length] = x_BSI[row, :length]
        out, _ = call(linear, x, alone)
        assert_close(out[0, :length], together[row, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"gating": "dataset"}, {"gating": "sentence"}, {"gating": "token"}])
def test_a_batch_of_padding(fields: dict[str, Any]) -> None:
    """Nothing to decide, yet a finite output, and gradients (of 0) for the experts where ranks reduce them."""
    linear = expert_linear(mocle(**fields)).train()
    context = replace(rows_context([0, 0], 3, num_instruction=0), num_samples=0, embedding_NG=embeddings(1))
    x = inputs(context).requires_grad_()
    out, decision = call(linear, x, context)
    assert torch.isfinite(out).all()
    assert not decision.keep_RK.any()
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())


def test_only_the_chosen_experts_get_gradients() -> None:
    linear = expert_linear(mocle())
    context = with_table(rows_context(LENGTHS, SEQUENCE), embeddings(1).expand(4, -1))
    out, decision = call(linear, inputs(context), context)
    out.sum().backward()
    chosen = int(decision.expert_ids_RK[0, 0])
    has_gradient = linear.lora_B.grad.abs().sum(dim=(1, 2)) > 0
    assert has_gradient.tolist() == [expert in (chosen, 3) for expert in range(4)]
    assert linear.gate.weight.grad.abs().sum() > 0


def test_what_was_decided_at_the_prompt_holds() -> None:
    linear = expert_linear(mocle())
    context = with_table(rows_context(LENGTHS, SEQUENCE), embeddings(4))
    x = inputs(context)
    out, decision = call(linear, x, context)
    later = replace(context, prompt={SITE: decision}, embedding_NG=None, cluster_N=None)
    again, _ = call(linear, x, later)
    assert torch.equal(again, out)


def test_dropout_is_on_what_the_experts_read() -> None:
    """Weights: an A of ones sums x, whose kept numbers are doubled at p = 0.5; the base reads x as it is."""
    settings = LoRASettings(rank=1, alpha=1.0, dropout=0.5)
    linear = LoRALinear(nn.Linear(1000, 1, bias=False), settings, SITE).train()
    with torch.no_grad():
        linear.weight.zero_()
        linear.lora_A.fill_(1.0)
        linear.lora_B.fill_(1.0)
    torch.manual_seed(1)
    total = float(linear(torch.ones(1, 1000)))
    assert total % 2 == 0
    assert 900 < total < 1100
    assert total != 1000
    assert float(linear.eval()(torch.ones(1, 1000))) == 1000


def test_bfloat16() -> None:
    linear = expert_linear(mocle())
    context = with_table(rows_context(LENGTHS, SEQUENCE), embeddings(4))
    x = inputs(context)
    expected, _ = call(linear, x, context)
    out, decision = call(linear.bfloat16(), x.bfloat16(), context)
    assert out.dtype == torch.bfloat16
    assert decision.probs_RE.dtype == torch.float32
    assert_close(out.float(), expected, atol=0.15, rtol=0.05)


def test_adapters_of_another_type_than_the_weight() -> None:
    """A bf16 model whose adapters are float32, as PEFT makes them by default."""
    linear = expert_linear(mocle())
    context = with_table(rows_context(LENGTHS, SEQUENCE), embeddings(4))
    x = inputs(context)
    expected, _ = call(linear, x, context)
    linear.weight.data, linear.bias.data = linear.weight.data.bfloat16(), linear.bias.data.bfloat16()
    out, _ = call(linear, x.bfloat16(), context)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, atol=0.15, rtol=0.05)


def test_wrong_inputs() -> None:
    context = with_table(rows_context([2, 2], 2), embeddings(2))
    x = inputs(context)
    linear = expert_linear(mocle())
    with pytest.raises(ValueError, match=r"adapter.self_attn.q_proj of layer 3 was called outside its decoder layer"):
        linear(x)
    with pytest.raises(ValueError, match=r"input of shape \(2, 1, 8\) for a routing context of shape \(2, 2\)"):
        call(linear, x[:, :1], context)
    with pytest.raises(ValueError, match=r"gating cluster: the routing context holds no embeddings; allowed: adapters"):
        call(linear, x, replace(context, embedding_NG=None))
    with pytest.raises(ValueError, match=r"adapter.noise: 0.5774 in training needs draw_N"):
        call(linear.train(), x, replace(context, draw_N=None))
    released = expert_linear(mocle(compat="released"))
    with pytest.raises(ValueError, match="gating cluster: the instructions' clusters are not known"):
        call(released, x, replace(context, cluster_N=None))
    sentence = expert_linear(mocle(gating="sentence"))
    with pytest.raises(ValueError, match="gating sentence: it is not known which tokens are the instruction"):
        call(sentence, x, replace(context, instruction_BS=None))
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="gating sentence: sample 1 of the batch has no instruction"):
        call(sentence, x, replace(context, instruction_BS=mask))
