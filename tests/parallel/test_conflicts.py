"""STGC on several processes: an expert's mean gradient is that of one micro-batch, wherever its rows come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_lvlm.moe.upcycle import moe_layers
from tests.parallel.comparison import assert_equals_plain_loop
from tests.parallel.jobs import Case
from tests.parallel.problems import Outcome, Problem, batches, build

pytestmark = pytest.mark.distributed
Trained = Callable[[Case], list[Outcome]]

CONFLICTS = Problem(train=("connector", "moe"), routing="stgc", num_steps=2)


@pytest.mark.parametrize(
    ("world", "size", "zero", "has_checkpointing"),
    [(2, 1, 2, False), (2, 2, 1, True), (2, 2, 3, True), (4, 4, 2, False), (4, 2, 3, False)],
)
def test_equals_one_process(trained: Trained, world: int, size: int, zero: int, has_checkpointing: bool) -> None:
    case = Case(CONFLICTS, world=world, zero=zero, expert_parallel_size=size, has_checkpointing=has_checkpointing)
    assert_equals_plain_loop(case, trained(case))


def test_routers_alone(trained: Trained) -> None:
    """Experts that are not trained have gradients to be in conflict with all the same."""
    case = Case(Problem(train=("router",), routing="stgc", num_steps=2), world=2, zero=2, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("number", [0, 1])
def test_the_problem_has_conflicts_that_move_the_routers(number: int) -> None:
    """Some assignments in conflict and some not, and gradients of the routers that are not those without the loss."""
    batch = batches(CONFLICTS, 0)[number]
    grads = {}
    for coefficient in (0.0, 1.0):
        model = build(CONFLICTS)
        for _, layer in moe_layers(model):
            layer.router.coefficient = coefficient  # type: ignore[assignment]
        output = model(**batch, output_routing=True)
        output.loss.backward()
        for _, decision in output.routing.items():
            assert 0.02 < decision.conflict_RK.sum() / decision.keep_RK.sum() < 0.9
        grads[coefficient] = [layer.router.gate.weight.grad for _, layer in moe_layers(model)]
    for without, with_loss in zip(grads[0.0], grads[1.0], strict=True):
        assert (with_loss - without).norm() > 0.1 * without.norm()
