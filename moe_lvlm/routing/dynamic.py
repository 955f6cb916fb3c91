"""DynMoE's router (Guo et al. 2024, arXiv 2405.14297): a token takes any number of experts, and experts come and go.

T tokens   D model width   E experts (allocated, active or not)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import DynamicRouterSettings, MoEConfig
from moe_lvlm.routing.gates import Gate
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision

_SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's


class TopAnyScores(NamedTuple):
    """What the gate says of tokens, all float32.

    logits_TE: cosines over the temperature. margin_TE: sigmoid of them above sigmoid of the thresholds; an expert with
    a margin above 0 is chosen. diversity_and_simplicity: scalar, without coefficient.
    """

    logits_TE: Tensor
    margin_TE: Tensor
    diversity_and_simplicity: Tensor


class TopAnyGate(Gate):
    """Cosine of a token and an expert's embedding against the expert's threshold.

    weight: [E, D], orthogonal rows at the start. threshold: [E], 0 at the start: a token takes the experts whose
    embedding is less than a right angle away. Both starts are those of DynMoE's code.
    """

    def __init__(self, model_width: int, num_experts: int, *, temperature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, model_width))
        self.threshold = nn.Parameter(torch.empty(num_experts))
        self.temperature = temperature
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.threshold)

    def forward(self, x_TD: Tensor, is_active_E: Tensor) -> TopAnyScores:
        with torch.autocast(x_TD.device.type, enabled=False):
            unit_ED = nn.functional.normalize(self.weight.float(), dim=-1, eps=_SMALLEST_NORM)
            logits_TE = _Cosine.apply(x_TD, unit_ED) / self.temperature
            threshold_E = (self.threshold.float() / self.temperature).sigmoid()
            return TopAnyScores(
                logits_TE,
                logits_TE.sigmoid() - threshold_E,
                diversity_and_simplicity(self.weight.float(), is_active_E),
            )


class DynamicRouter(Router):
    """LTDR's DYNAMIC: top-any gating over the experts that are active (DynMoE).

    Chosen are all active experts with sigmoid(cos / temperature) above sigmoid(threshold / temperature); their outputs
    are averaged. In training a token may have none: its output is 0, and it asks for a new expert. Outside training it
    then takes the active expert with the highest score. Padding takes none. So an upcycled model (fine_grained 1) is
    the dense one at step 0 in evaluation mode, and in training mode where a token has an expert.

    Gradients: the weight of a chosen expert is 1 / (number chosen) in value; backwards the step from the margin to the
    choice is the identity (straight-through, DynMoE's code), and experts that were not chosen get none.

    logits_RE, probs_RE: cosines over the temperature, and their softmax over the active experts, 0 for others. It
    decides nothing (ours; top-any has no distribution): it orders the experts of a token, best first, and it is what
    the balance loss and the analysis read. A chosen expert may come after one that was not chosen, as thresholds
    differ.

    penalty: coefficient x (diversity + simplicity); DynMoE's paper. Its later code adds a balance and a sparsity term;
    a balance loss is `moe.balance` here.

    Buffers, in checkpoints and model folders:
    is_active_E: bool. Training alone changes it (`training/adaptation.py`).
    taken: int64 [E + 1], tokens that each expert took since experts were last adapted, and, last, that none took.
    unrouted_D: int64, sum of the latter tokens' hidden states in units of `UNIT`.
    The last two are training's and no forward pass reads or writes them. Being integers they add up exactly in any
    order, and casting a model to bf16 leaves them alone.
    """

    UNIT = 2.0**-20

    settings: DynamicRouterSettings
    is_active_E: Tensor
    taken: Tensor
    unrouted_D: Tensor

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__(model_width=model_width, config=config)
        self.initial_experts = self.settings.initial_experts or config.num_experts
        self.gate = TopAnyGate(model_width, config.num_experts, temperature=self.settings.temperature)
        self.register_buffer("is_active_E", torch.arange(config.num_experts) < self.initial_experts)
        self.register_buffer("taken", torch.zeros(config.num_experts + 1, dtype=torch.int64))
        self.register_buffer("unrouted_D", torch.zeros(model_width, dtype=torch.int64))

    @property
    def num_slots(self) -> int:
        return self.num_experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Buffers too."""
        self.gate.reset_parameters()
        self.is_active_E.copy_(torch.arange(self.num_experts) < self.initial_experts)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Forget what was counted for the next adaptation."""
        self.taken.zero_()
        self.unrouted_D.zero_()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        scores = self.gate(x_TD, self.is_active_E)
        logits_TE, margin_TE = scores.logits_TE, scores.margin_TE
        probs_TE = logits_TE.masked_fill(~self.is_active_E, -torch.inf).softmax(dim=-1)
        # A stable sort: equal scores go to the lowest index on every device.
        expert_ids_TK = probs_TE.sort(dim=-1, descending=True, stable=True).indices

        is_token_T1 = (context.modality_T != Modality.PADDING)[:, None]
        chosen_TE = (margin_TE > 0) & self.is_active_E & is_token_T1
        is_unrouted_T1 = is_token_T1 & ~chosen_TE.any(dim=-1, keepdim=True)
        unrouted_D = None
        if self.training:
            unrouted_D = torch.where(is_unrouted_T1, x_TD.detach(), 0).sum(dim=0, dtype=torch.float32)
        else:
            best_T1 = expert_ids_TK[:, :1]
            chosen_TE = chosen_TE.scatter(1, best_T1, chosen_TE.gather(1, best_T1) | is_unrouted_T1)

        # value 1 where chosen; x - x is exactly 0
        choice_TE = chosen_TE * (1 + (margin_TE - margin_TE.detach()))
        weights_TE = choice_TE / chosen_TE.sum(dim=-1, keepdim=True).clamp_min(1)
        return RoutingDecision(
            logits_TE,
            probs_TE,
            expert_ids_TK,
            weights_TE.gather(1, expert_ids_TK),
            chosen_TE.gather(1, expert_ids_TK),
            penalty=self.settings.coefficient * scores.diversity_and_simplicity,
            unrouted_D=unrouted_D,
        )


def diversity_and_simplicity(weight_ED: Tensor, is_active_E: Tensor) -> Tensor:
    """DynMoE's auxiliary loss over the K active experts: ||W W^T - I_K||_F of unit rows, + the mean norm of the rows.

    weight_ED: float32 embeddings. As in DynMoE's code the first term sees rows of length 1; the diagonal, 0 by definition,
    is left out, so that rounding makes no gradient of it. The second term is a mean over the active experts; DynMoE's
    code takes it over all that are allocated.
    """
    unit_ED = nn.functional.normalize(weight_ED, dim=-1, eps=_SMALLEST_NORM)
    is_pair_EE = (
        is_active_E[:, None] & is_active_E & ~torch.eye(len(is_active_E), dtype=torch.bool, device=weight_ED.device)
    )
    diversity = torch.linalg.vector_norm((unit_ED @ unit_ED.t()).masked_fill(~is_pair_EE, 0))
    norm_E = torch.linalg.vector_norm(weight_ED, dim=-1)
    simplicity = norm_E.masked_fill(~is_active_E, 0).sum() / is_active_E.sum()
    return diversity + simplicity


class _Cosine(torch.autograd.Function):
    """Cosines of tokens and rows of length 1, [T, E] in float32, keeping x in its own type for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, unit_ED: Tensor) -> Tensor:
        x32_TD = x_TD.float()
        norm_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)
        cosine_TE = x32_TD @ unit_ED.t() / norm_T1
        ctx.save_for_backward(x_TD, unit_ED, norm_T1, cosine_TE)
        return cosine_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, unit_ED, norm_T1, cosine_TE = ctx.saved_tensors
        grad_TE = grads[0] / norm_T1
        grad_x_TD = grad_unit_ED = None
        if ctx.needs_input_grad[0]:
            along_T1 = (grad_TE * cosine_TE).sum(dim=-1, keepdim=True) / norm_T1
            grad_x_TD = (grad_TE @ unit_ED - along_T1 * x_TD.float()).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_unit_ED = grad_TE.t() @ x_TD.float()
        return grad_x_TD, grad_unit_ED
