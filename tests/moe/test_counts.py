"""What the layer costs, in counts that do not wobble: bytes kept for the backward pass, looks of the host at the device,
bytes and messages exchanged, memory allocated. A change that costs more of one fails here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe import kernels
from moe_lvlm.moe.dispatch import AllToAllDispatcher
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.fused import FusedFFN
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.products import Products
from moe_lvlm.moe.rows import RowPlan, plan_rows
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.types import Modality, RoutingContext, Site

T, D, F, E, K = 256, 64, 176, 4, 2
# Operators with which the host waits for a device.
LOOKS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_dim", "_unique2", "is_nonzero"}


class Recorder(TorchDispatchMode):
    """Counts operators, and bytes of the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocated = 0
        self.sent: list[int] = []  # bytes of each exchange
        self._storages: dict[int, Any] = {}  # held, so that no address comes twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._keep([one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)])
        out = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        if function.overloadpacket.__name__ == "alltoall_base_":
            self.sent.append(args[1].numel() * args[1].element_size())
        made = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, Tensor)]
        self.allocated += self._keep(made)
        return out

    def _keep(self, tensors: list[Tensor]) -> int:
        new = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        new = {address: storage for address, storage in new.items() if address and address not in self._storages}
        self._storages |= new
        return sum(storage.nbytes() for storage in new.values())

    @property
    def looks(self) -> int:
        return sum(count for name, count in self.calls.items() if name in LOOKS)


def make_layer(kind: str = "top_k") -> MoELayer:
    config = MoEConfig.model_validate({"num_experts": E, "top_k": K, "router": {"kind": kind}})
    torch.manual_seed(0)
    return MoELayer(
        router=build_router(model_width=D, config=config),
        experts=Experts(num_experts=E, model_width=D, ffn_width=F, activation="silu"),
        site=Site("language_model", 0),
    ).bfloat16()


def inputs(kind: str = "top_k") -> tuple[Tensor, RoutingContext]:
    context = RoutingContext.all_language((1, T), torch.device("cpu"))
    if kind == "ltdr":
        context.modality_BS[:, : T // 2] = int(Modality.VISION)
        context.image_BS[:, : T // 2] = 0
    x_BSD = torch.randn(1, T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    return x_BSD.requires_grad_(), context


def kept_bytes(module: nn.Module, *args: Any) -> int:
    """Bytes that autograd keeps, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*args)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["top_k", "ltdr"])
def test_kept_for_the_backward_pass(kind: str) -> None:
    """X once, gate and up of each row; beside them the router's own numbers and indices, which do not grow with D or F."""
    layer, (x_BSD, context) = make_layer(kind), inputs(kind)
    rows = int(layer.router(x_BSD[0], context).keep_RK.sum())
    assert rows == T * K if kind == "top_k" else T * K < rows < T * E
    needed = 2 * (T * D + 2 * rows * F)
    slots = E if kind == "ltdr" else K
    assert needed < kept_bytes(layer, x_BSD, context) <= needed + T * (12 * E + 40 * slots) + 256


def test_memory_of_a_pass() -> None:
    """Of R rows: gate, up, and while an expert is computed its act and product. Backwards what the gradients need."""
    layer, (x_BSD, context) = make_layer(), inputs()
    layer(x_BSD, context).sum().backward()  # makes .grad
    row_bytes, weight_bytes = 2 * T * K * F, sum(2 * stack.numel() for stack in layer.experts.parameters())
    with Recorder() as forward:
        out_BSD = layer(x_BSD, context)
    # in rows of width F: gate, up, act and product are 4; the rest is of width D (x in float32 for the gate, rows, sums)
    assert forward.allocated < 4 * row_bytes + 16 * T * K * D
    with Recorder() as backward:
        out_BSD.backward(torch.ones_like(out_BSD))
    # act, its product, the gradients of both, of gate and up, and what the activation's gradient takes
    assert backward.allocated < weight_bytes + 8 * row_bytes + 40 * T * K * D


def test_operators_of_a_pass() -> None:
    layer, (x_BSD, context) = make_layer(), inputs()
    with Recorder() as forward:
        out_BSD = layer(x_BSD, context)
    assert forward.calls["mm"] + forward.calls["addmm"] == 1 + 3 * E  # the gate, and three products an expert
    assert sum(forward.calls.values()) < 50 + 22 * E
    with Recorder() as backward:
        out_BSD.sum().backward()
    assert backward.calls["mm"] + backward.calls["addmm_"] == 2 + 6 * E
    assert sum(backward.calls.values()) < 50 + 60 * E


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Of one process: what is sent does not depend on to whom."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_exchanges_of_a_pass(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, rows and their weights there, rows back; gradients the same way, and one look of the host."""
    layer, (x_BSD, context) = make_layer(), inputs()
    expected = layer(x_BSD, context)
    layer.dispatcher = AllToAllDispatcher(group)
    lists: list[Tensor] = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(tensor), to_list(tensor))[1])
    with Recorder() as forward:
        out_BSD = layer(x_BSD, context)
    monkeypatch.undo()
    rows, weights = 2 * T * K * D, 4 * T * K
    assert sorted(forward.sent) == sorted([4 * E, weights, rows, rows])
    # on the CPU the plan counts its rows besides, which a GPU's does not
    assert len(lists) + forward.calls["_local_scalar_dense"] == 2
    torch.testing.assert_close(out_BSD, expected)
    with Recorder() as backward:
        out_BSD.sum().backward()
    assert sorted(backward.sent) == sorted([weights, rows, rows])


@pytest.mark.parametrize(("is_grouped", "expected"), [(True, 0), (False, 1)])
def test_looks_of_the_host_on_a_gpu(is_grouped: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' path, run by the interpreter: none with grouped products, one where the host needs the counts."""
    layer, (x_BSD, context) = make_layer(), inputs()
    layer.float()
    lists: list[Tensor] = []
    to_list = torch.Tensor.tolist
    with Recorder() as recorder:
        decision = layer.router(x_BSD[0].float(), context)
    # an interpreted kernel looks at its arguments, a compiled one does not
    slot_R, row_NK, stop_E = kernels.plan(decision.expert_ids_RK, decision.keep_RK, E)
    assert torch.equal(row_NK, plan_rows(decision).row_NK)
    plan = RowPlan(slot_R, row_NK, stop_E, None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(tensor), to_list(tensor))[1])
    with recorder:
        products = Products(plan if is_grouped else plan.counted(), is_grouped, is_grouped)
    monkeypatch.undo()
    assert decision.fills_slots  # else the dispatcher counts the rows, which is the same one look
    assert recorder.looks + len(lists) == expected
    experts = layer.experts
    out_TD = FusedFFN.apply(
        x_BSD[0].float(), decision.weights_RK, products, kernels.SILU, experts.w1, experts.w2, experts.w3
    )
    torch.testing.assert_close(out_TD, layer(x_BSD.float(), context)[0], atol=1e-5, rtol=1e-4)
