"""Rows to other processes and back, beside whatever is computed meanwhile, in both directions of the pass.

N rows
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """Uneven splits of rows between the ranks of a group: `send[r]` of them go to rank r, `receive[r]` come from it.

    Every rank starts and finishes the same exchanges in the same order, also those that bring it nothing.
    """

    def __init__(self, group: dist.ProcessGroup, *, send: tuple[int, ...], receive: tuple[int, ...]) -> None:
        self.group = group
        self.send = send
        self.receive = receive

    def reversed(self) -> RowExchange:
        """The way back."""
        return RowExchange(self.group, send=self.receive, receive=self.send)

    def start(self, x: Tensor) -> Flight:
        """Send rows [sum(send), ...] off."""
        return Flight(self, x)


class Flight:
    """Rows under way. What is computed between its start and `finish()` runs beside it; so does, in the backward pass,
    what belongs to that, beside their gradients: autograd goes the way back in the same order."""

    def __init__(self, exchange: RowExchange, x: Tensor) -> None:
        self._exchange = exchange
        self._under_way: _UnderWay | None = None
        self._sent: Tensor | None = _Start.apply(x, self)

    def finish(self) -> Tensor:
        """The rows, [sum(receive), ...]. To be called once."""
        arrived: Tensor = _Finish.apply(self._sent, self)
        self._sent = None  # its graph holds this object
        return arrived

    def send(self, x: Tensor, *, is_gradient: bool = False) -> Tensor:
        """Start an exchange there, or of gradients back; what is given is being filled until `wait`."""
        assert self._under_way is None, "one exchange at a time"
        send, receive = self._exchange.send, self._exchange.receive
        if is_gradient:
            send, receive = receive, send
        x = x.contiguous()
        arriving = x.new_empty((sum(receive), *x.shape[1:]))
        work = dist.all_to_all_single(arriving, x, list(receive), list(send), group=self._exchange.group, async_op=True)
        self._under_way = _UnderWay(work, x, arriving)
        return arriving

    def wait(self) -> Tensor:
        """What is under way, once it is there (on CUDA the current stream waits, not the host)."""
        assert self._under_way is not None, "nothing is under way"
        self._under_way.work.wait()
        arrived = self._under_way.arriving
        self._under_way = None
        return arrived


class _UnderWay(NamedTuple):
    """sent: must live until it has arrived."""

    work: Any
    sent: Tensor
    arriving: Tensor


class _Start(torch.autograd.Function):
    """Gives its input back, which `_Finish` takes for what came of it: a gradient under way has the input's shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.send(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.wait()
        return grads[0], None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.send(grads[0], is_gradient=True), None
