"""DYNAMIC: top-any gating worked by hand, its gradients, its loss, and the model around it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.weights import load_weights
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.dynamic import DynamicRouter, diversity_and_simplicity
from moe_lvlm.routing.types import Modality, RoutingContext
from tests.tiny_models import tiny_causal_lm, tiny_moe_llava

WIDTH = 4


def dynamic_config(num_experts: int = 4, **settings: Any) -> MoEConfig:
    return MoEConfig.model_validate({"num_experts": num_experts, "top_k": 1, "router": {"kind": "dynamic"} | settings})


def identity_router(**settings: Any) -> DynamicRouter:
    """Four experts whose embeddings are the axes, with thresholds 0."""
    router = build_router(model_width=WIDTH, config=dynamic_config(**settings))
    assert isinstance(router, DynamicRouter)
    with torch.no_grad():
        router.gate.weight.copy_(3 * torch.eye(4))  # only the direction counts
    return router


def language(num_tokens: int) -> RoutingContext:
    return RoutingContext.all_language((1, num_tokens), torch.device("cpu"))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# By hand: cosines are the coordinates over the length, 3 of (2, 1, -2, 0), 5 of (0, 0, 3, 4), 1, 2.
TOKENS = torch.tensor([[2.0, 1, -2, 0], [0, 0, 3, 4], [0, -1, 0, 0], [-1, -1, -1, -1]])
COSINES = torch.tensor([[2, 1, -2, 0], [0, 0, 3, 4], [0, -1, 0, 0], [-1, -1, -1, -1]]) / torch.tensor(
    [[3], [5], [1], [2]]
)


def test_scores_are_cosines() -> None:
    decision = identity_router()(TOKENS, language(4))
    torch.testing.assert_close(decision.logits_RE, COSINES)
    torch.testing.assert_close(decision.probs_RE, COSINES.softmax(dim=-1))


def test_a_token_takes_every_expert_above_its_threshold() -> None:
    """Thresholds 0: the experts with a positive coordinate, best first, equal weights; none where there is none."""
    decision = identity_router().train()(TOKENS, language(4))
    assert decision.expert_ids_RK.tolist() == [[0, 1, 3, 2], [3, 2, 0, 1], [0, 2, 3, 1], [0, 1, 2, 3]]
    assert decision.keep_RK.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert decision.weights_RK.tolist() == [[0.5, 0.5, 0, 0]] * 2 + [[0] * 4] * 2


def test_thresholds_are_each_expert_s_own() -> None:
    """Expert 0 wants a cosine above .7 (token 0 has .67), expert 1 above -1.1, so that it takes everything."""
    router = identity_router().train()
    with torch.no_grad():
        router.gate.threshold.copy_(torch.tensor([0.7, -1.1, 0.0, 0.0]))
    decision = router(TOKENS, language(4))
    # token 0: experts in the order 0, 1, 3, 2; the best is not chosen, the second is
    assert decision.keep_RK[0].tolist() == [False, True, False, False]
    assert decision.weights_RK[0].tolist() == [0, 1, 0, 0]
    # token 1: order 3, 2, 0, 1
    assert decision.keep_RK[1].tolist() == [True, True, False, True]
    torch.testing.assert_close(decision.weights_RK[1], torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]))


def test_in_evaluation_a_token_without_expert_takes_the_best() -> None:
    decision = identity_router().eval()(TOKENS, language(4))
    assert decision.keep_RK.tolist() == [[True, True, False, False]] * 2 + [[True, False, False, False]] * 2
    assert decision.expert_ids_RK[2:, 0].tolist() == [0, 0]  # the lowest of equal ones
    assert decision.weights_RK[2:].tolist() == [[1, 0, 0, 0]] * 2
    assert decision.unrouted_D is None


def test_tokens_without_expert_ask_for_one_and_padding_does_not() -> None:
    context = language(4)
    context = RoutingContext(
        modality_BS=torch.tensor([[1, 1, 1, int(Modality.PADDING)]], dtype=torch.int8),
        image_BS=context.image_BS,
        sample_BS=torch.tensor([[0, 0, 0, -1]], dtype=torch.int32),
    )
    router = identity_router().train()
    decision = router(TOKENS, context)
    assert decision.unrouted_D is not None
    assert decision.unrouted_D.tolist() == [0, -1, 0, 0]
    assert not decision.unrouted_D.requires_grad
    assert not router.eval()(TOKENS, context).keep_RK[3].any()


def test_inactive_experts_are_never_chosen() -> None:
    router = identity_router(initial_experts=1).eval()
    assert router.is_active_E.tolist() == [True, False, False, False]
    decision = router(TOKENS, language(4))
    assert decision.expert_ids_RK[decision.keep_RK].tolist() == [0, 0, 0, 0]
    assert decision.probs_RE.tolist() == [[1, 0, 0, 0]] * 4
    assert router.train()(TOKENS, language(4)).keep_RK.any(dim=-1).tolist() == [True, False, False, False]


def test_the_gradient_goes_straight_through_the_choice() -> None:
    """By hand: d weight / d sigmoid(score) is 1 / number chosen, d / d sigmoid(threshold) minus that."""
    router = identity_router(temperature=0.5, coefficient=0.0).train()
    logits: list[Tensor] = []
    router.gate.register_forward_hook(
        lambda module, args, out: out.logits_TE.retain_grad() or logits.append(out.logits_TE)
    )
    decision = router(TOKENS, language(4))
    (decision.weights_RK * torch.tensor([[5.0, 7, 100, 100]])).sum().backward()
    expected = torch.zeros(4, 4)
    # two experts each: half of 5 for the best and of 7 for the second, times sigmoid' at cosine / .5
    for token, expert, factor in ((0, 0, 2.5), (0, 1, 3.5), (1, 3, 2.5), (1, 2, 3.5)):
        value = sigmoid(2 * float(COSINES[token, expert]))
        expected[token, expert] = factor * value * (1 - value)
    torch.testing.assert_close(logits[0].grad, expected)
    # sigmoid'(0) = 1/4, times 1 / temperature
    torch.testing.assert_close(router.gate.threshold.grad, -torch.tensor([2.5, 3.5, 3.5, 2.5]) / 4 / 0.5)


def test_gradients_of_the_cosines_are_autograd_s() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(3, WIDTH, generator=generator).requires_grad_()
    toward = torch.randn(7, 3, generator=generator)
    router = build_router(model_width=WIDTH, config=dynamic_config(3))
    assert isinstance(router, DynamicRouter)
    with torch.no_grad():
        router.gate.weight.copy_(weight)
    ours = x.detach().clone().requires_grad_()
    (router(ours, language(7)).logits_RE * toward).sum().backward()
    (cosine_similarity(x[:, None], weight[None], dim=-1) * toward).sum().backward()
    torch.testing.assert_close(ours.grad, x.grad)
    torch.testing.assert_close(router.gate.weight.grad, weight.grad)


def test_diversity_and_simplicity() -> None:
    """By hand: unit rows (1, 0), (.6, .8), (0, 1) have products .6, 0, .8; lengths 1, 5, 2."""
    weight = torch.tensor([[1.0, 0], [3, 4], [0, 2]])
    everyone = torch.tensor([True, True, True])
    torch.testing.assert_close(
        diversity_and_simplicity(weight, everyone), torch.tensor(math.sqrt(2 * (0.36 + 0.64)) + 8 / 3)
    )
    without_second = torch.tensor([True, False, True])
    torch.testing.assert_close(diversity_and_simplicity(weight, without_second), torch.tensor(1.5))


def test_an_idle_expert_gets_no_gradient_and_one_alone_only_simplicity() -> None:
    weight = torch.tensor([[1.0, 0], [3, 4]], requires_grad=True)
    diversity_and_simplicity(weight, torch.tensor([False, True])).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0, 0], [0.6, 0.8]]))


def test_the_penalty_carries_its_coefficient() -> None:
    decision = identity_router(coefficient=0.1)(TOKENS, language(4))
    torch.testing.assert_close(decision.penalty, torch.tensor(0.3))


def test_new_embeddings_are_orthogonal_and_thresholds_0() -> None:
    router = build_router(model_width=9, config=dynamic_config(4))
    assert isinstance(router, DynamicRouter)
    torch.testing.assert_close(router.gate.weight @ router.gate.weight.t(), torch.eye(4), atol=1e-6, rtol=0)
    assert router.gate.threshold.tolist() == [0, 0, 0, 0]


def test_bf16_does_not_touch_what_is_counted() -> None:
    router = identity_router(initial_experts=3)
    router.unrouted_D.fill_(2**40 + 1)
    router.bfloat16()
    assert router.is_active_E.tolist() == [True, True, True, False]
    assert router.unrouted_D.tolist() == [2**40 + 1] * 4
    assert router.gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": {"kind": "dynamic", "initial_experts": 5}}, "initial_experts: 5; allowed: 1 to num_experts"),
        ({"router": {"kind": "dynamic", "initial_experts": 0}}, "initial_experts"),
        ({"router": {"kind": "dynamic", "gate": {"kind": "cosine"}}}, "gate: .*not read by dynamic"),
        ({"router": {"kind": "dynamic", "renormalize": False}}, "renormalize: False: not read by dynamic"),
        ({"router": {"kind": "dynamic"}, "capacity_factor": 1.5}, "capacity_factor: 1.5: dynamic drops nothing"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.model_validate({"num_experts": 4} | settings)


def test_settings_survive_a_round_trip() -> None:
    config = dynamic_config(initial_experts=2, adapt_every=7)
    assert MoEConfig.model_validate(config.to_dict()) == config


def test_the_layer_is_the_mean_of_the_chosen_experts() -> None:
    """Against a loop over tokens and experts; a token without expert has output 0 in training."""
    model = tiny_moe_llava(dynamic_config(4))
    _, layer = moe_layers(model)[0]
    router = layer.router
    assert isinstance(router, DynamicRouter)
    with torch.no_grad():
        router.gate.threshold.copy_(torch.tensor([0.15, 0.1, 0.05, 0.2]))
        router.is_active_E[2] = False
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(3))
    experts = dict(layer.experts.named_parameters())
    for is_training in (True, False):
        layer.train(is_training)
        out = layer(x)[0]
        numbers = set()
        for token in range(40):
            cosines = cosine_similarity(x[0, token][None], router.gate.weight)
            chosen = [e for e in (0, 1, 3) if cosines[e] > router.gate.threshold[e]]
            numbers.add(len(chosen))
            if not chosen and not is_training:
                chosen = [max((0, 1, 3), key=cosines.tolist().__getitem__)]
            expected = torch.zeros(32)
            for e in chosen:
                w1, w2, w3 = (experts[name][e] for name in ("w1", "w2", "w3"))
                hidden = layer.experts.act(w1 @ x[0, token]) * (w3 @ x[0, token])
                expected = expected + (w2 @ hidden) / len(chosen)
            torch.testing.assert_close(out[token], expected, atol=1e-5, rtol=1e-4)
        assert {0, 1, 2} <= numbers


def test_an_upcycled_model_in_evaluation_mode_is_the_dense_one() -> None:
    from moe_lvlm.models.upcycle import upcycle

    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    dense = tiny_causal_lm()
    expected = dense(ids).logits
    sparse = upcycle(dense, dynamic_config(4, initial_experts=2)).eval()
    torch.testing.assert_close(sparse(ids).logits, expected, atol=1e-5, rtol=1e-5)


class _State:
    """A state dict as a source of weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def names(self) -> list[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        return self.state[name][slice(start, stop)].clone()


def test_a_model_is_read_with_its_active_experts() -> None:
    from moe_lvlm.models.build import build_empty

    model = tiny_moe_llava(dynamic_config(4))
    for _, layer in moe_layers(model):
        assert isinstance(layer.router, DynamicRouter)
        layer.router.is_active_E[1] = False
        layer.router.taken += 5
    empty = build_empty(model.config)
    load_weights(empty, _State(model.state_dict()))
    for (name, tensor), (_, expected) in zip(empty.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name


def test_a_dense_model_is_read_into_a_new_router() -> None:
    from moe_lvlm.models.build import build_empty
    from moe_lvlm.models.upcycle import as_moe_llava
    from tests.tiny_models import tiny_llava

    dense = as_moe_llava(tiny_llava())
    empty = build_empty(dense.config.with_moe(dynamic_config(4, initial_experts=3)))
    load_weights(empty, _State(dense.state_dict()), router_seed=5)
    for _, layer in moe_layers(empty):
        router = layer.router
        assert isinstance(router, DynamicRouter)
        assert router.is_active_E.tolist() == [True, True, True, False]
        assert not router.taken.any()
        torch.testing.assert_close(router.gate.weight @ router.gate.weight.t(), torch.eye(4), atol=1e-5, rtol=0)
