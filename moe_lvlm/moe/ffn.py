"""Dense FFNs as their families write them, read as one thing, and cut into experts.

D model width   F FFN width   f width of an expert (F / m)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lvlm.moe.experts import Experts

# name of a parameter of the dense FFN -> the tensor
ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNLayout:
    """Where a family keeps the three (or two) matrices of its FFN.

    gate, up, down: names of the linear layers. up is None where the FFN is not gated; fused_gate_up says that the
    layer named `gate` holds the gate's rows and then the up projection's (Phi-3). activation: the attribute of the
    family's config that names the activation function.
    """

    gate: str
    up: str | None
    down: str
    fused_gate_up: bool = False
    activation: str = "hidden_act"

    @property
    def is_gated(self) -> bool:
        return self.up is not None or self.fused_gate_up

    @property
    def children(self) -> frozenset[str]:
        """Names of the linear layers that the dense FFN must have, and no other."""
        return frozenset(name for name in (self.gate, self.up, self.down) if name is not None)


GATED = FFNLayout(gate="gate_proj", up="up_proj", down="down_proj")
FUSED_GATED = FFNLayout(gate="gate_up_proj", up=None, down="down_proj", fused_gate_up=True)
TWO_LAYER = FFNLayout(gate="fc1", up=None, down="fc2")


def ffn_shape(ffn: nn.Module, layout: FFNLayout) -> tuple[int, int, bool]:
    """(D, F, has biases) of a dense FFN."""
    down = ffn.get_submodule(layout.down)
    assert isinstance(down, nn.Linear)
    return down.out_features, down.in_features, down.bias is not None


def dense_names(expert_parameter: str, layout: FFNLayout) -> str:
    """The dense parameter from which an expert parameter (w1, ..., b3) is cut.

    Raises:
        ValueError: the layout has no such matrix.
    """
    kind = "weight" if expert_parameter.startswith("w") else "bias"
    layer = {"1": layout.gate, "2": layout.down, "3": layout.gate if layout.fused_gate_up else layout.up}[
        expert_parameter[1]
    ]
    if layer is None:
        raise ValueError(f"an FFN that is not gated has no {expert_parameter}")
    return f"{layer}.{kind}"


def cut_experts(name: str, read: ReadTensor, layout: FFNLayout, *, start: int, stop: int, fine_grained: int) -> Tensor:
    """Experts start .. stop - 1 of the stacked parameter `name` (w1, ..., b3), cut from a dense FFN.

    Expert e is slice e mod m of the dense FFN: rows of gate and up, columns of down, the down bias by m. So all m
    slices, summed with weight 1, are the dense FFN, and for m = 1 each expert is a copy of it.
    """
    dense = read(dense_names(name, layout))
    if layout.fused_gate_up and name[1] in "13":
        half = dense.shape[0] // 2
        dense = dense[:half] if name[1] == "1" else dense[half:]
    if name == "b2":
        pieces = (dense / fine_grained,) * fine_grained
    else:
        pieces = dense.chunk(fine_grained, dim=1 if name == "w2" else 0)
    return torch.stack([pieces[expert % fine_grained] for expert in range(start, stop)])


@torch.no_grad()
def copy_dense_into(experts: Experts, ffn: nn.Module, layout: FFNLayout, *, fine_grained: int) -> None:
    """Make every expert its slice of the dense FFN."""
    for name, parameter in experts.named_parameters():
        parameter.copy_(
            cut_experts(name, ffn.get_parameter, layout, start=0, stop=parameter.shape[0], fine_grained=fine_grained)
        )
