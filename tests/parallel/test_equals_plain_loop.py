"""Expert parallelism under DeepSpeed equals a plain loop on one process: losses, norms, parameters after three steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.testing import assert_close

from tests.parallel.comparison import assert_equals_plain_loop, assert_training_is_real, moved
from tests.parallel.jobs import Case
from tests.parallel.plain_loop import solve
from tests.parallel.problems import FAVOURED, LEARNING_RATE, ROUTINGS, WEIGHT_DECAY, Outcome, Problem, build

pytestmark = pytest.mark.distributed
Trained = Callable[[Case], list[Outcome]]

MIXED = Problem(train=("connector", "moe"))
STARVED = Problem(is_starved=True)
EMPTY = Problem(layout="padding only")


@pytest.mark.parametrize(
    ("world", "size", "zero"),
    [
        (1, 1, 2),
        *((2, size, zero) for size in (1, 2) for zero in (1, 2, 3)),
        *((4, 4, zero) for zero in (1, 2, 3)),
        (4, 2, 2),
        (4, 2, 3),
        *(pytest.param(4, size, zero, marks=pytest.mark.slow) for size, zero in ((1, 1), (1, 2), (1, 3), (2, 1))),
    ],
)
def test_mixed_batches(trained: Trained, world: int, size: int, zero: int) -> None:
    case = Case(MIXED, world=world, zero=zero, expert_parallel_size=size)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize(("world", "zero"), [(2, 1), (2, 2), (2, 3), (4, 2), (4, 3)])
def test_experts_of_a_rank_get_nothing(trained: Trained, world: int, zero: int) -> None:
    case = Case(STARVED, world=world, zero=zero, expert_parallel_size=world)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize(("world", "zero"), [(2, 1), (2, 2), (2, 3), (4, 3)])
def test_a_rank_has_only_padding(trained: Trained, world: int, zero: int) -> None:
    case = Case(EMPTY, world=world, zero=zero, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("family", ["phi", pytest.param("stablelm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [2, 3])
def test_other_ffns(trained: Trained, family: str, zero: int) -> None:
    """Phi: biases, no gate, attention and FFN in parallel. Its whole language model is trained, head bias included."""
    case = Case(Problem(family=family, train=("language_model",)), world=2, zero=zero, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_routers_alone(trained: Trained, zero: int) -> None:
    case = Case(Problem(train=("router",)), world=2, zero=zero, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("routing", sorted(ROUTINGS.keys() - {"ltdr"}))
def test_every_routing(trained: Trained, routing: str, zero: int) -> None:
    """Text-only, image and empty micro-batches, so that ranks differ in what their routers see."""
    case = Case(Problem(layout="padding only", routing=routing), world=2, zero=zero, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("routing", sorted(ROUTINGS.keys() - {"ltdr"}))
def test_the_plain_loop_trains_every_routing(routing: str) -> None:
    assert_training_is_real(Problem(layout="padding only", routing=routing))


@pytest.mark.parametrize(
    "problem", [MIXED, EMPTY, Problem(train=("router",)), Problem(family="phi", train=("language_model",))]
)
def test_the_plain_loop_trains(problem: Problem) -> None:
    assert_training_is_real(problem)


def test_starved_experts_only_decay() -> None:
    """The last two experts have a gradient of 0: Adam leaves them alone, weight decay does not; the others learn."""
    start, after = dict(build(STARVED).named_parameters()), solve(STARVED).parameters
    names = [name for name in start if ".experts." in name]
    for name in names:
        decayed = start[name] * (1 - LEARNING_RATE * WEIGHT_DECAY) ** STARVED.num_steps
        assert_close(after[name][FAVOURED:], decayed[FAVOURED:].detach(), rtol=1e-6, atol=1e-7)
        assert ((after[name] - decayed)[:FAVOURED].abs().amax(dim=(1, 2)) > 1e-4).all(), name
    assert names and moved(STARVED)
