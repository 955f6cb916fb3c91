"""Bringing tokens to their experts and the results back: on one process, or across an expert-parallel group.

T tokens   D model width   E experts (all)   K slots a token   A assignments made here   R rows received here
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lvlm.moe.types import ExpertRows, LoRAChoice
from moe_lvlm.routing.types import RoutingDecision


class Assignments(NamedTuple):
    """Kept slots as a flat list, sorted by expert, within an expert by token.

    token_A, slot_A: int64. counts_E: int64, assignments of each expert.
    """

    token_A: Tensor
    slot_A: Tensor
    counts_E: Tensor


def sort_assignments(decision: RoutingDecision) -> Assignments:
    """Kept (token, slot) pairs in the order of their experts; dropless, whatever the number a token."""
    num_experts = decision.probs_RE.shape[-1]
    token_A, slot_A = decision.keep_RK.nonzero(as_tuple=True)
    expert_A = decision.expert_ids_RK[token_A, slot_A]
    order_A = expert_A.argsort(stable=True)
    return Assignments(token_A[order_A], slot_A[order_A], torch.bincount(expert_A, minlength=num_experts))


class Route(NamedTuple):
    """What `combine` needs to bring the rows of one `dispatch` back.

    send, receive: rows for and from each rank of the group, empty on one process.
    unsort_R: place of each received row among the rows sorted by expert, None on one process.
    """

    assignments: Assignments
    num_tokens: int
    dtype: torch.dtype
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()
    unsort_R: Tensor | None = None


class Dispatcher(ABC):
    """Moves rows to experts and back; never drops one."""

    @abstractmethod
    def dispatch(
        self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None
    ) -> tuple[ExpertRows, Route]:
        """Rows for the experts held here, sorted by expert. lora: each token's choice, which goes with its rows."""

    @abstractmethod
    def combine(self, y_RD: Tensor, route: Route) -> Tensor:
        """The sum of each token's (already weighted) expert outputs, [T, D]; 0 for a token that no expert took."""


class LocalDispatcher(Dispatcher):
    """All experts are here."""

    def dispatch(
        self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None
    ) -> tuple[ExpertRows, Route]:
        assignments = sort_assignments(decision)
        rows = ExpertRows(
            x_TD.index_select(0, assignments.token_A),
            decision.weights_RK[assignments.token_A, assignments.slot_A],
            tuple(assignments.counts_E.tolist()),
            probe_R=_of_assignments(decision.probe_RK, assignments),
            lora=None if lora is None else _of_tokens(lora, assignments),
        )
        return rows, Route(assignments, x_TD.shape[0], x_TD.dtype)

    def combine(self, y_RD: Tensor, route: Route) -> Tensor:
        return _sum_by_token(y_RD, route)


class AllToAllDispatcher(Dispatcher):
    """Experts are spread evenly over a process group: rank r holds experts r * E / size to (r + 1) * E / size.

    One exchange of counts and one look of the host at them; then rows and weights go with uneven splits. A rank that
    sends or receives no row takes part all the same.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def dispatch(
        self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None
    ) -> tuple[ExpertRows, Route]:
        assignments = sort_assignments(decision)
        num_local = assignments.counts_E.numel() // self.size
        received_counts = torch.empty_like(assignments.counts_E)
        dist.all_to_all_single(received_counts, assignments.counts_E, group=self.group)
        # [rank, local expert]: sent to, and received from, each rank
        both = torch.stack((assignments.counts_E, received_counts)).view(2, self.size, num_local).tolist()
        send = tuple(sum(counts) for counts in both[0])
        receive = tuple(sum(counts) for counts in both[1])
        counts_by_source = tuple(tuple(counts) for counts in zip(*both[1], strict=True))
        local_counts = tuple(sum(counts) for counts in counts_by_source)

        sorted_AD = x_TD.index_select(0, assignments.token_A)
        weights_A = decision.weights_RK[assignments.token_A, assignments.slot_A]
        probe_A = _of_assignments(decision.probe_RK, assignments)
        arrived_RD = _exchange(sorted_AD, self.group, send, receive)
        arrived_weights_R = _exchange(weights_A, self.group, send, receive)
        arrived_probe_R = None if probe_A is None else _exchange(probe_A, self.group, send, receive)
        arrived_lora = None
        if lora is not None:
            ids_AC, gates_AC = _of_tokens(lora, assignments)
            arrived_lora = LoRAChoice(
                _all_to_all(ids_AC, self.group, send, receive), _exchange(gates_AC, self.group, send, receive)
            )

        # Rows arrive by rank, then by expert; experts want them by expert alone.
        expert_R = torch.arange(num_local, device=x_TD.device).repeat(self.size)
        expert_R = expert_R.repeat_interleave(received_counts, output_size=sum(receive))
        order_R = expert_R.argsort(stable=True)
        rows = ExpertRows(
            arrived_RD.index_select(0, order_R),
            arrived_weights_R.index_select(0, order_R),
            local_counts,
            counts_by_source,
            None if arrived_probe_R is None else arrived_probe_R.index_select(0, order_R),
            None if arrived_lora is None else LoRAChoice(*(value.index_select(0, order_R) for value in arrived_lora)),
        )
        unsort_R = torch.empty_like(order_R)
        unsort_R[order_R] = torch.arange(order_R.numel(), device=x_TD.device)
        return rows, Route(assignments, x_TD.shape[0], x_TD.dtype, send, receive, unsort_R)

    def combine(self, y_RD: Tensor, route: Route) -> Tensor:
        assert route.unsort_R is not None
        returned_AD = _exchange(y_RD.index_select(0, route.unsort_R), self.group, route.receive, route.send)
        return _sum_by_token(returned_AD, route)


def _of_assignments(values_TK: Tensor | None, assignments: Assignments) -> Tensor | None:
    return None if values_TK is None else values_TK[assignments.token_A, assignments.slot_A]


def _of_tokens(lora: LoRAChoice, assignments: Assignments) -> LoRAChoice:
    """The choice of each assignment's token."""
    return LoRAChoice(*(value.index_select(0, assignments.token_A) for value in lora))


def _sum_by_token(y_AD: Tensor, route: Route) -> Tensor:
    """Sum of the rows of each token in float32, cast back to the type of the layer's input."""
    return _SumByToken.apply(y_AD, route.assignments.token_A, route.num_tokens, route.dtype)


class _SumByToken(torch.autograd.Function):
    """Adds up rows by token. Its gradient needs the tokens' indices only; index_add would keep the rows for it."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, token_A: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(token_A)
        ctx.dtype = y_AD.dtype
        out_TD = y_AD.new_zeros((num_tokens, y_AD.shape[1]), dtype=torch.promote_types(y_AD.dtype, torch.float32))
        return out_TD.index_add_(0, token_A, y_AD.to(out_TD.dtype)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_A,) = ctx.saved_tensors
        return grads[0].index_select(0, token_A).to(ctx.dtype), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    return _AllToAllRows.apply(x, group, send, receive)


class _AllToAllRows(torch.autograd.Function):
    """Rows to other ranks with uneven splits; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _all_to_all(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
    return out
