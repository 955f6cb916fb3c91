"""Low-rank adapters on the stacked matrices of a MoE layer's experts: every expert has pairs of its own.

The layer's router picks the expert that computes a token's row; a gate, one a layer and stack, picks the LoRA expert
that helps it there. The choice is made for tokens, before they go to their experts, and travels with the rows.

E MoE experts held here   L LoRA experts (without the universal one)   E' LoRA experts, the universal one last
T tokens   D model width   R routed rows   K LoRA experts chosen   I inputs, O outputs of a matrix   r rank
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.gates import expert_weights
from moe_lvlm.adapters.linear import AdaptedLinear, GatedAdapter, draw_a
from moe_lvlm.adapters.low_rank import add_grouped_experts
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.moe.dispatch import LocalDispatcher
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.types import ExpertSlice, LoRAChoice
from moe_lvlm.routing.stgc import ConflictRouter
from moe_lvlm.routing.types import Site

STACKS = ("w1", "w2", "w3")
"""The matrices of experts that can be adapted, by their names in `Experts`."""


class StackedAdapter(AdaptedLinear):
    """lora_A: [E, E', rank, I]; lora_B: [E, E', O, rank], in the type and on the device of the stack."""

    def __init__(self, stack: Tensor, settings: LoRASettings, site: Site, *, num_pairs: int) -> None:
        super().__init__()
        num_experts, num_outputs, num_inputs = stack.shape
        self.settings = settings
        self.site = site
        self.facts = None
        self.lora_A = nn.Parameter(stack.new_empty(num_experts, num_pairs, settings.rank, num_inputs))
        self.lora_B = nn.Parameter(stack.new_empty(num_experts, num_pairs, num_outputs, settings.rank))

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """As a linear's. Pairs of experts that other processes hold are drawn too and left, so that every expert gets the
        same numbers however they are spread."""
        num_held = self.lora_A.shape[0]
        held: ExpertSlice = getattr(self.lora_A, "expert_slice", ExpertSlice(0, num_held, num_held))
        for expert in range(held.total):
            is_here = held.start <= expert < held.stop
            for a_rI in self.lora_A[expert - held.start] if is_here else torch.empty_like(self.lora_A[0]):
                draw_a(a_rI)
        nn.init.zeros_(self.lora_B)


class StackedLoRA(StackedAdapter):
    """W_e x + scale B_e A_e x for a row on MoE expert e."""

    def __init__(self, stack: Tensor, settings: LoRASettings, site: Site) -> None:
        super().__init__(stack, settings, site, num_pairs=1)
        self.reset_adapter()

    def forward(self, base_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Sum of base (which is written into) and what the adapter gives. counts: rows of each MoE expert."""
        return add_grouped_experts(
            base_RO, self._drop(x_RI), self.lora_A, self.lora_B, counts=counts, weights_AR=self.settings.scale
        )


class StackedLoRAExperts(GatedAdapter, StackedAdapter):
    """W_e x + scale (G_max E_e,top(x) + (1 - G_max) U_e(x)) for a row on MoE expert e (MoCLE eq. 3 at each of them), or
    without U_e the sum of G_i E_e,i(x) (eq. 2).

    One gate for all MoE experts, so that a sample's LoRA expert is the same wherever its tokens go.
    """

    def __init__(self, stack: Tensor, settings: MoCLESettings, site: Site, *, model_width: int) -> None:
        super().__init__(stack, settings, site, num_pairs=settings.num_experts + settings.has_universal)
        self._add_gate(model_width, stack)
        self.reset_adapter()

    def choose(self, x_TD: Tensor) -> LoRAChoice:
        """Ids and gates G [T, K] of the LoRA experts of each token. x_TD: input of the MoE layer, which gates `sentence`
        and `token` read, that of w2 too: its own input is an expert's.

        Raises:
            ValueError: outside an adapted decoder layer, for other tokens than the context's, or without the facts that
                the gate reads.
        """
        decision, facts = self._decide_and_record(x_TD)
        by_token = decision.by_token(facts.context)
        return LoRAChoice(by_token.expert_ids_RK, by_token.weights_RK)

    def forward(self, base_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...], lora: LoRAChoice) -> Tensor:
        """Sum of base (which is written into) and what the adapter gives. counts: rows of each MoE expert. lora: of each
        row, [R, K].

        Rows are sorted by (MoE expert, LoRA expert), and each group computes its own. The universal expert stands
        beside each of the others, as one LoRA of rank 2 r.
        """
        L, rank, (num_rows, K) = self.settings.num_experts, self.settings.rank, lora.ids.shape
        a_GrI, b_GOr = self.lora_A[:, :L], self.lora_B[:, :L]
        weights_RK1 = expert_weights(lora.gates, self.settings)[..., None]
        if self.settings.has_universal:
            a_GrI = torch.cat((a_GrI, self.lora_A[:, L:].expand(-1, L, -1, -1)), dim=2)
            b_GOr = torch.cat((b_GOr, self.lora_B[:, L:].expand(-1, L, -1, -1)), dim=3)
            weights_RK1 = torch.cat((weights_RK1, 1 - lora.gates[..., None]), dim=2)
        count_E = torch.tensor(counts, device=x_RI.device)
        expert_R = torch.arange(len(counts), device=x_RI.device).repeat_interleave(count_E, output_size=num_rows)
        group_A = (expert_R[:, None] * L + lora.ids).flatten()
        order_A = group_A.argsort(stable=True)
        weights_AR = weights_RK1.repeat_interleave(rank, dim=2).flatten(0, 1)[order_A] * self.settings.scale
        return add_grouped_experts(
            base_RO,
            self._drop(x_RI),
            a_GrI,
            b_GOr,
            counts=tuple(torch.bincount(group_A, minlength=len(counts) * L).tolist()),
            weights_AR=weights_AR,
            row_A=order_A // K,
        )


class StackAdapters(nn.ModuleDict):
    """The adapters of one MoE layer by the name of the stack, in the order of `STACKS`."""

    def choose(self, x_TD: Tensor) -> LoRAChoice | None:
        """The choice of each token at each stack, side by side; None for single LoRAs."""
        chosen = [adapter.choose(x_TD) for adapter in self.values() if isinstance(adapter, StackedLoRAExperts)]
        if not chosen:
            return None
        return LoRAChoice(*(torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True)))

    def add(self, name: str, base_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...], lora: LoRAChoice | None) -> Tensor:
        """Sum of base (which is written into) and what the adapter of a stack gives; base itself where there is none."""
        adapter = self._modules.get(name)
        if isinstance(adapter, StackedLoRA):
            base_RO = adapter(base_RO, x_RI, counts)
        elif isinstance(adapter, StackedLoRAExperts):
            assert lora is not None, "rows without the choice that their tokens made"
            first = list(self).index(name) * adapter.settings.top_k
            columns = slice(first, first + adapter.settings.top_k)
            chosen = LoRAChoice(*(value[:, columns] for value in lora))
            base_RO = adapter(base_RO, x_RI, counts, chosen)
        return base_RO


def adapt_stack(layer: MoELayer, name: str, settings: LoRASettings, site: Site) -> None:
    """Put an adapter on a stack of a layer's experts, in place. name: of `STACKS`, in their order."""
    stack = layer.experts.get_parameter(name)
    if layer.adapters is None:
        layer.adapters = StackAdapters()
    assert isinstance(layer.adapters, StackAdapters)
    layer.adapters[name] = (
        StackedLoRAExperts(stack, settings, site, model_width=layer.experts.w2.shape[1])
        if isinstance(settings, MoCLESettings)
        else StackedLoRA(stack, settings, site)
    )


def stack_names(layer: MoELayer) -> list[str]:
    """Which of `STACKS` a layer's experts have; FFNs that are not gated have no w3."""
    return [name for name in STACKS if getattr(layer.experts, name) is not None]


def check_adaptable(layer: MoELayer) -> None:
    """Whether the experts of a layer can take adapters.

    Raises:
        ValueError: a router that asks for cosines of the experts' gradients, or experts that are spread already.
    """
    where = f"the experts of layer {layer.site.layer}"
    if isinstance(layer.router, ConflictRouter):
        raise ValueError(
            f"adapter.target_modules: {where} have a router of kind stgc, which compares gradients on their "
            "own matrices; allowed: other linear layers, or another router"
        )
    if not isinstance(layer.dispatcher, LocalDispatcher):
        raise ValueError(
            f"adapter.target_modules: {where} are spread over processes; allowed: adapters first, then expert parallelism"
        )
