"""Q-MoE under DeepSpeed: ranks that share a batch train as one process that has it whole.

The importance of experts is summed over ranks, noise is drawn by sample, dropout is off.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.parallel.problems import Outcome
from tests.parallel.qmoe import Case, build, solve, train
from tests.parallel.rank_server import RankServer

pytestmark = pytest.mark.distributed


def outcomes(ranks: RankServer, case: Case, folder: Path) -> list[Outcome]:
    return [Outcome.of(result) for result in ranks.run(train, case, world=case.world, folder=folder)]


@pytest.mark.parametrize(
    "case",
    [
        *(Case(zero=zero) for zero in (1, 2, 3)),
        Case(world=1),
        *(Case(text="t5", zero=zero, has_text_only=True) for zero in (2, 3)),
        *(Case(has_text_only=True, router=router, zero=zero) for router in ("pre", "post", "cls") for zero in (2, 3)),
        Case(selection="greedy", zero=3),
        Case(has_checkpointing=True, zero=3),
    ],
    ids=str,
)
def test_ranks_equal_one_process(ranks: RankServer, tmp_path: Path, case: Case) -> None:
    plain = solve(case)
    for outcome in outcomes(ranks, case, tmp_path):
        assert_close(outcome.losses, plain.losses, rtol=1e-5, atol=1e-5)
        # sure routers are sharp: rounding in one step is some ten times as large in the norm two steps later
        assert_close(outcome.norms, plain.norms, rtol=5e-4, atol=0)
        assert outcome.parameters.keys() == plain.parameters.keys()
        for name, parameter in outcome.parameters.items():
            assert_close(parameter, plain.parameters[name], rtol=1e-4, atol=5e-5, msg=name)


def test_bf16_trains(ranks: RankServer, tmp_path: Path) -> None:
    """Within bf16's rounding of the plain loop in float32."""
    case = Case(precision="bf16", zero=3)
    plain = solve(Case())
    for outcome in outcomes(ranks, case, tmp_path):
        assert_close(outcome.losses, plain.losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", [Case(), Case(text="t5", has_text_only=True)], ids=str)
def test_the_plain_loop_moves_the_connector_and_nothing_else(case: Case) -> None:
    """All of it but the text FFN of the top layer, which nothing reads where the router does not."""
    start, end = dict(build(case).named_parameters()), solve(case).parameters
    moved = {name for name, value in end.items() if float((value - start[name]).abs().max()) > 1e-5}
    trained = {name for name, parameter in start.items() if parameter.requires_grad}
    assert moved <= trained
    still = trained - moved
    # keys' biases shift all scores of a query alike; positions and words that no sample has
    assert all(".key.bias" in name or "embeddings" in name for name in still), still
    assert all(torch.isfinite(value).all() for value in end.values())
