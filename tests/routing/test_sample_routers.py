"""Routers that decide for whole samples (CLUSTER, INSTRUCT) and the task loss (TASK), by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.task import task_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, Site
from tests.routing.tables import TOKENS, A, B, D, H, hidden_of, identity_router, table_context


def sample_router(**router: Any) -> Router:
    """Four experts, top 2, a gate that is the identity."""
    config = MoEConfig.model_validate({"num_experts": 4, "top_k": 2, "router": router})
    made = build_router(model_width=4, config=config)
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(4))
    return made


def with_instruction(*names: str) -> RoutingContext:
    """The table's context, G A C E . B D F H ., in which tokens at these places are the instruction."""
    places = {int(name) for name in names}
    is_instruction = torch.tensor([place in places for place in range(10)])
    context = table_context()
    return replace(context, instruction_BS=is_instruction.view(context.modality_BS.shape))


def test_instruct_averages_hidden_states_of_the_instruction() -> None:
    # sample 0: A; sample 1: B and H, the mean of whose logarithms gives sqrt(p q) up to a factor
    decision = sample_router(kind="instruct")(hidden_of(*TOKENS), with_instruction("1", "5", "8"))
    assert decision.level == "sample"
    mixed = torch.tensor([0.10 * 0.10, 0.10 * 0.20, 0.70 * 0.30, 0.10 * 0.40]).sqrt()
    assert_close(decision.probs_RE, torch.stack((torch.tensor(A), mixed / mixed.sum())))
    # A: 0 and 1; mixed (.100, .141, .458, .200): 2 and 3
    assert decision.expert_ids_RK.tolist() == [[0, 1], [2, 3]]
    assert_close(decision.weights_RK[0], torch.tensor([4 / 7, 3 / 7]))


def test_every_token_of_a_sample_goes_its_way_and_padding_nowhere() -> None:
    context = with_instruction("1", "5", "8")
    decision = sample_router(kind="instruct")(hidden_of(*TOKENS), context).by_token(context)
    assert decision.expert_ids_RK[[0, 1, 2, 3]].tolist() == [[0, 1]] * 4
    assert decision.expert_ids_RK[[5, 6, 7, 8]].tolist() == [[2, 3]] * 4
    assert decision.keep_RK.sum(dim=-1).tolist() == [2, 2, 2, 2, 0, 2, 2, 2, 2, 0]
    assert (decision.weights_RK[[4, 9]] == 0).all()


def test_a_sample_without_an_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch has no instruction token"):
        sample_router(kind="instruct")(hidden_of(*TOKENS), with_instruction("1"))


def test_cluster_reads_the_embedding_and_not_the_tokens() -> None:
    router = sample_router(kind="cluster", num_clusters=3, embedding_width=4)
    with torch.no_grad():
        router.embedding.weight.copy_(hidden_of(H, D, B))
    context = replace(table_context(), cluster_N=torch.tensor([1, 0]))
    decision = router(torch.randn(10, 4), context)
    assert_close(decision.probs_RE, torch.tensor([D, H]))
    assert decision.expert_ids_RK.tolist() == [[1, 3], [3, 2]]
    assert_close(decision.weights_RK, torch.tensor([[11 / 18, 7 / 18], [4 / 7, 3 / 7]]))


def test_task_loss_is_the_cross_entropy_of_the_labelled_tokens() -> None:
    # sample 0 (G A C E) has label 2: P_2 = .01, .20, .25, .30; sample 1 has none
    context = replace(table_context(), task_N=torch.tensor([2, -1]))
    decision = identity_router(kind="task")(hidden_of(*TOKENS), context)
    expected = -torch.tensor([0.01, 0.20, 0.25, 0.30]).log().mean()
    assert_close(task_loss(decision, context), expected)


def test_task_loss_pulls_to_the_expert_of_the_task() -> None:
    context = replace(table_context(), task_N=torch.tensor([3, 0]))
    x = hidden_of(*TOKENS).requires_grad_()
    task_loss(identity_router(kind="task")(x, context), context).backward()
    assert x.grad is not None
    # mean over eight tokens of P - onehot: A with label 3
    assert_close(x.grad[1], (torch.tensor(A) - torch.tensor([0.0, 0.0, 0.0, 1.0])) / 8)
    assert (x.grad[[4, 9]] == 0).all()


@pytest.mark.parametrize("task_N", [None, torch.tensor([-1, -1])])
def test_no_label_gives_zero_and_a_gradient_of_zero(task_N: torch.Tensor | None) -> None:
    router = identity_router(kind="task")
    context = replace(table_context(), task_N=task_N)
    loss = task_loss(router(hidden_of(*TOKENS), context), context)
    assert loss.item() == 0
    loss.backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.abs().sum() == 0


def test_the_auxiliary_loss_adds_the_task_loss() -> None:
    config = MoEConfig.model_validate({"router": {"kind": "task", "coefficient": 0.5}, "balance": {"on": []}})
    context = replace(table_context(), task_N=torch.tensor([2, -1]))
    trace = RoutingTrace(context)
    for layer in (0, 2):
        trace.record(Site("language_model", layer), identity_router(kind="task")(hidden_of(*TOKENS), context))
    loss = auxiliary_loss(trace, config)
    assert loss is not None
    assert_close(loss, -2 * 0.5 * torch.tensor([0.01, 0.20, 0.25, 0.30]).log().mean())
