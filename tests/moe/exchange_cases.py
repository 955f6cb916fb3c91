"""What each process of `test_all_to_all.py` does. A module of its own, so that a spawned process can import it."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lvlm.moe.dispatch import AllToAllDispatcher
from moe_lvlm.routing.types import RoutingDecision
from tests.moe.tables import decision_of, random_experts, run_layer

NUM_EXPERTS, WIDTH = 8, 6
WORLD = 4

# case -> the experts of each token, by rank. Ranks hold experts 0-1, 2-3, 4-5, 6-7 in a group of four, and 0-3, 4-7
# in a group of two (ranks 0, 1 and ranks 2, 3).
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], ...]] = {
    "even": (((0, 3), (7, 5), (2, 6)), ((1, 4), (6, 0), (3, 5)), ((5, 1), (2, 7), (4, 0)), ((7, 2), (0, 6), (3, 1))),
    "uneven tokens and choices": (((0,), (5, 2, 7), ()), ((6, 1),), ((3, 0, 4), (1,), (2,), (7, 6)), ((), (0, 5))),
    "rank 1 and rank 3 get no row": (((0, 4), (1,)), ((5, 0), (4,)), ((1, 5), (0, 4, 1)), ((4, 0),)),
    "the second of a group of two gets no row": (((0, 1), (2,)), ((3, 0),), ((1, 2), (0, 3, 1)), ((2,),)),
    "rank 2 has no kept token": (((0, 6), (5,)), ((7, 2, 1),), ((), ()), ((3, 4), (1, 5))),
    "rank 0 has no token": ((), ((7, 2, 1), (0,)), ((5, 4),), ((3, 4), (1, 5))),
    "nobody has a kept token": (((),), ((), ()), ((),), ((),)),
    "all on one expert": (((6,),) * 5, ((6,),) * 2, ((6,),), ((6,),) * 3),
}
GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((0, 1), (2, 3)), 4: ((0, 1, 2, 3),)}


def inputs_of(case: str, rank: int, *, is_probed: bool) -> tuple[Tensor, RoutingDecision]:
    """Hidden states and decision of one rank, with gradients for the states and the weights, and a probe if asked."""
    choices = CASES[case][rank]
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(len(choices), WIDTH, generator=generator).requires_grad_()
    decision = decision_of(choices, NUM_EXPERTS, seed=rank)
    return x_TD, decision._replace(
        weights_RK=decision.weights_RK.clone().requires_grad_(),
        probe_RK=torch.zeros_like(decision.weights_RK).requires_grad_() if is_probed else None,
    )


def results_of(out_TD: Tensor, x_TD: Tensor, decision: RoutingDecision, experts: nn.Module) -> dict[str, Any]:
    """Backward of a loss that weighs every output differently; then everything that can be compared."""
    scale = torch.arange(1.0, out_TD.numel() + 1).view_as(out_TD).cos()
    (out_TD * scale).sum().backward()
    return {
        "out": out_TD.detach(),
        "x": x_TD.grad,
        "weights": decision.weights_RK.grad,
        "probe": None if decision.probe_RK is None else decision.probe_RK.grad,
        "experts": {name: parameter.grad for name, parameter in experts.named_parameters()},
    }


def run_rank(rank: int, folder: str) -> None:
    """All cases in all groups on one process; results go to a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results: dict[tuple[int, str, bool], Any] = {}
    for size, members in GROUPS.items():
        groups = [dist.new_group(list(ranks)) for ranks in members]
        place = next(index for index, ranks in enumerate(members) if rank in ranks)
        dispatcher = AllToAllDispatcher(groups[place])
        start = members[place].index(rank) * NUM_EXPERTS // size
        for case, is_probed in itertools.product(CASES, (False, True)):
            experts = random_experts(NUM_EXPERTS, width=WIDTH)
            for name, stack in list(experts.named_parameters()):
                experts._parameters[name] = nn.Parameter(stack.detach()[start : start + NUM_EXPERTS // size].clone())
            x_TD, decision = inputs_of(case, rank, is_probed=is_probed)
            out_TD = run_layer(dispatcher, experts, x_TD, decision)
            results[size, case, is_probed] = results_of(out_TD, x_TD, decision, experts)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
