"""Bringing tokens to their experts and the results back: on one process, or across an expert-parallel group.

T tokens   D model width   E experts (all)   K slots a token   A assignments made here   N rows that arrived here
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lvlm.moe.exchange import Flight, RowExchange
from moe_lvlm.moe.rows import RowPlan, add_rows, plan_rows, take_rows, take_slots
from moe_lvlm.moe.types import ExpertRows, LoRAChoice
from moe_lvlm.routing.types import RoutingDecision


class Dispatch(ABC):
    """Rows on their way to the experts of one layer, and back. What is computed between its making and `rows()` goes on
    beside the way there, and in the backward pass beside the way back."""

    @abstractmethod
    def rows(self) -> ExpertRows:
        """What the experts held here compute on, once it is there. To be called once."""

    @abstractmethod
    def combine(self, y_ND: Tensor) -> Tensor:
        """The sum of each token's (weighted) expert outputs, [T, D]; 0 for a token that no expert took.

        y_ND: the experts' outputs for `rows()`, summed by row of x.
        """


class Dispatcher(ABC):
    """Moves rows to experts and back; never drops one."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None) -> Dispatch:
        """Send each token to its experts. lora: each token's choice, which goes with its rows."""


class LocalDispatcher(Dispatcher):
    """All experts are here."""

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None) -> Dispatch:
        plan = plan_rows(decision)
        if not decision.fills_slots:  # memory for all slots would be many times that for the rows
            plan = plan.counted()
        return _LocalDispatch(ExpertRows(x_TD, plan, decision.weights_RK, probe_NK=decision.probe_RK, lora=lora))


class _LocalDispatch(Dispatch):
    def __init__(self, rows: ExpertRows) -> None:
        self._rows = rows

    def rows(self) -> ExpertRows:
        return self._rows

    def combine(self, y_ND: Tensor) -> Tensor:
        return y_ND


class AllToAllDispatcher(Dispatcher):
    """Experts are spread evenly over a process group: rank r holds experts r * E / size to (r + 1) * E / size.

    One exchange of counts and one look of the host at them; then rows and weights go with uneven splits. A rank that
    sends or receives no row takes part all the same.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, lora: LoRAChoice | None = None) -> Dispatch:
        plan = plan_rows(decision)
        sent_E = plan.stop_E.diff(prepend=plan.stop_E.new_zeros(1))
        received_E = torch.empty_like(sent_E)
        dist.all_to_all_single(received_E, sent_E, group=self.group)
        # [rank, local expert]: sent to, and received from, each rank
        sent, received = torch.stack((sent_E, received_E)).view(2, self.size, -1).tolist()
        counts_here = tuple(count for counts in sent for count in counts)
        plan = plan._replace(counts=counts_here, slot_R=plan.slot_R[: sum(counts_here)])
        exchange = RowExchange(
            self.group,
            send=tuple(sum(counts) for counts in sent),
            receive=tuple(sum(counts) for counts in received),
        )
        values = [take_slots(decision.weights_RK, plan)]
        if decision.probe_RK is not None:
            values.append(take_slots(decision.probe_RK, plan))
        if lora is not None:
            values += lora.of_rows(plan.source_R)
        return _ExchangedDispatch(
            exchange,
            plan,
            [exchange.start(value) for value in (take_rows(x_TD, plan), *values)],
            arrival=_arrival_plan(received_E.view(self.size, -1), sum(exchange.receive)),
            counts_by_source=tuple(tuple(counts) for counts in zip(*received, strict=True)),
            has_probe=decision.probe_RK is not None,
            dtype=x_TD.dtype,
        )


class _ExchangedDispatch(Dispatch):
    def __init__(
        self,
        exchange: RowExchange,
        plan: RowPlan,
        flights: list[Flight],
        *,
        arrival: RowPlan,
        counts_by_source: tuple[tuple[int, ...], ...],
        has_probe: bool,
        dtype: torch.dtype,
    ) -> None:
        self._exchange = exchange
        self._plan = plan
        self._flights = flights
        self._arrival = arrival._replace(counts=tuple(sum(counts) for counts in counts_by_source))
        self._counts_by_source = counts_by_source
        self._has_probe = has_probe
        self._dtype = dtype

    def rows(self) -> ExpertRows:
        x_ND, weights_N, *others = (flight.finish() for flight in self._flights)
        probe_N = others.pop(0) if self._has_probe else None
        return ExpertRows(
            x_ND,
            self._arrival,
            weights_N[:, None],
            self._counts_by_source,
            None if probe_N is None else probe_N[:, None],
            LoRAChoice(*others) if others else None,
        )

    def combine(self, y_ND: Tensor) -> Tensor:
        returned_AD = self._exchange.reversed().start(y_ND).finish()
        return add_rows(returned_AD, self._plan, self._dtype)


def _arrival_plan(received_SE: Tensor, num_rows: int) -> RowPlan:
    """The plan, without counts, of rows that arrived by rank, then by expert; experts want them by expert alone.

    received_SE: rows from each rank for each expert held here. All of it on the device: no look of the host.
    """
    start_SE = received_SE.flatten().cumsum(0, dtype=torch.int32).view_as(received_SE) - received_SE
    stop_ES = received_SE.t().flatten().cumsum(0, dtype=torch.int32).view(received_SE.shape[::-1])
    shift_SE = (stop_ES - received_SE.t()).t() - start_SE
    shift_N = shift_SE.flatten().repeat_interleave(received_SE.flatten(), output_size=num_rows)
    place_N = torch.arange(num_rows, dtype=torch.int32, device=received_SE.device)
    row_N = place_N + shift_N
    slot_R = torch.empty_like(row_N)
    slot_R.index_copy_(0, row_N.long(), place_N)
    return RowPlan(slot_R, row_N[:, None], stop_ES[:, -1].contiguous(), None)
