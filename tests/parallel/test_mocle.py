"""LoRA experts under DeepSpeed: ranks that share a batch train as one process that has it whole.

Noise is drawn by sample; dropout is off.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.parallel.mocle import Case, build, solve, train
from tests.parallel.problems import Outcome
from tests.parallel.rank_server import RankServer

pytestmark = pytest.mark.distributed

MLP = ("up_proj", "down_proj")


def outcomes(ranks: RankServer, case: Case, folder: Path) -> list[Outcome]:
    return [Outcome.of(result) for result in ranks.run(train, case, world=case.world, folder=folder)]


@pytest.mark.parametrize(
    "case",
    [
        *(Case(zero=zero) for zero in (1, 2, 3)),
        Case(world=1),
        *(Case(layout="padding only", zero=zero) for zero in (2, 3)),
        Case(layout="text against images", zero=3, targets=MLP),
        Case(gating="dataset", zero=3),
        Case(gating="sentence", zero=2),
        Case(gating="sentence", zero=3, layout="padding only"),
        Case(gating="token", zero=3, layout="padding only"),
        Case(gating="token", zero=2, targets=MLP),
        Case(has_universal=False, zero=3),
        Case(has_checkpointing=True, zero=3),
        Case(zero=3, persistence_threshold=10**5),
    ],
    ids=str,
)
def test_ranks_equal_one_process(ranks: RankServer, tmp_path: Path, case: Case) -> None:
    plain = solve(case)
    for outcome in outcomes(ranks, case, tmp_path):
        assert_close(outcome.losses, plain.losses, rtol=1e-6, atol=1e-6)
        assert_close(outcome.norms, plain.norms, rtol=1e-4, atol=0)
        assert outcome.parameters.keys() == plain.parameters.keys()
        for name, parameter in outcome.parameters.items():
            assert_close(parameter, plain.parameters[name], rtol=1e-5, atol=2e-6, msg=name)


def test_bf16_trains(ranks: RankServer, tmp_path: Path) -> None:
    """Within bf16's rounding of the plain loop in float32."""
    case = Case(precision="bf16", zero=3)
    plain = solve(Case())
    for outcome in outcomes(ranks, case, tmp_path):
        assert_close(outcome.losses, plain.losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", [Case(), Case(gating="token", targets=MLP), Case(has_universal=False)], ids=str)
def test_the_plain_loop_moves_all_that_is_trained_and_nothing_else(case: Case) -> None:
    start, end = dict(build(case).named_parameters()), solve(case).parameters
    trained = {name for name, parameter in start.items() if parameter.requires_grad}
    moved = {name for name, value in end.items() if float((value - start[name].detach()).abs().max()) > 1e-4}
    assert moved == trained
    assert {name.rpartition(".")[2] for name in trained} >= {"lora_A", "lora_B"}
    assert all("lora_" in name or "gate" in name or "table" in name or "projector" in name for name in trained)
