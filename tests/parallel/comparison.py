"""Comparison of what ranks computed with the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.testing import assert_close

from tests.parallel.jobs import Case
from tests.parallel.plain_loop import solve
from tests.parallel.problems import NUM_EXPERTS, Outcome, Problem, build


def assert_equals_plain_loop(case: Case, outcomes: Sequence[Outcome]) -> None:
    """Losses and norms of every step, and all parameters; of experts each rank's share."""
    plain = solve(case.problem)
    for rank, outcome in enumerate(outcomes):
        assert_close(outcome.losses, plain.losses, rtol=1e-6, atol=1e-6)
        assert_close(outcome.norms, plain.norms, rtol=1e-5, atol=0)
        assert outcome.parameters.keys() == plain.parameters.keys()
        for name, parameter in outcome.parameters.items():
            expected = plain.parameters[name]
            if ".experts." in name:
                # ranks of a group follow each other; each holds its part of the experts in their order
                held = NUM_EXPERTS // case.expert_parallel_size
                start = rank % case.expert_parallel_size * held
                expected = expected[start : start + held]
            worst = float((parameter - expected).abs().max())
            assert torch.allclose(parameter, expected, rtol=1e-6, atol=1e-6), f"rank {rank}, {name}: off by {worst}"


def moved(problem: Problem) -> dict[str, float]:
    """Largest change of each parameter in the plain loop."""
    start = dict(build(problem).named_parameters())
    return {
        name: float((after - start[name]).abs().max().detach()) for name, after in solve(problem).parameters.items()
    }


def assert_training_is_real(problem: Problem) -> None:
    """The plain loop moved what is trained, by far more than the tolerance, and nothing else."""
    changes = moved(problem)
    trained = {name for name, parameter in build(problem).named_parameters() if parameter.requires_grad}
    assert trained
    assert {name for name, change in changes.items() if change > 1e-4} == trained
    assert all(torch.isfinite(torch.tensor(list(changes.values()))))
