"""The experts of one layer: stacked FFNs, and the computation of rows sorted by expert.

E experts held here   D model width   F FFN width   N rows of x   K slots of each   R routed rows
G groups of rows   A rows of all groups   I inputs, O outputs of a linear layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lvlm.moe.conflict import ProbedFFN
from moe_lvlm.moe.grouped import (
    Activation,
    Hidden,
    StackGradients,
    Stacks,
    allocate_hidden,
    backward_rows,
    forward_rows,
    row_slices,
    sum_products,
)
from moe_lvlm.moe.rows import (
    RowPlan,
    add_rows,
    add_to_sum,
    save_plan,
    saved_plan,
    start_sum,
    take_rows,
    take_slots,
)
from moe_lvlm.moe.types import ExpertAdapters, ExpertRows


class Experts(nn.Module):
    """E feed-forward networks with stacked parameters, weighted by the router.

    Gated (LLaMA, Qwen, Mistral, Phi-3, StableLM): w2 (act(w1 x) * (w3 x)). Not gated (Phi-2, ViT, BERT): w2 act(w1 x).
    w1, w3: [E, F, D]; w2: [E, D, F]; biases, where the dense FFN has them: b1, b3 [E, F] and b2 [E, D]. The names
    w1, w2, w3 are those of DeepSpeed's expert-parallel layers.

    activation: a name in transformers' ACT2FN.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_width: int,
        ffn_width: int,
        activation: str,
        is_gated: bool = True,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise ValueError(f"activation: {activation!r} is not one of {sorted(ACT2FN)}")
        self.num_experts = num_experts
        self.activation = activation
        # Its function, not the module: under ZeRO-3 every rank must call the same modules, and each expert that has rows
        # calls this once.
        self.act: Activation = ACT2FN[activation].forward
        E, D, F = num_experts, model_width, ffn_width
        self.w1 = nn.Parameter(torch.empty(E, F, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F))
        self.w3 = nn.Parameter(torch.empty(E, F, D)) if is_gated else None
        self.b1 = nn.Parameter(torch.empty(E, F)) if has_bias else None
        self.b2 = nn.Parameter(torch.empty(E, D)) if has_bias else None
        self.b3 = nn.Parameter(torch.empty(E, F)) if has_bias and is_gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, N(0, 0.02), biases 0: experts that were not copied from a dense FFN."""
        for name, parameter in self.named_parameters():
            if name.startswith("w"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, rows: ExpertRows, adapters: ExpertAdapters | None = None) -> Tensor:
        """Weighted outputs, summed over the slots of each row of x, [N, D]; 0 where no slot is kept.

        Slots with a probe get the cosines of their gradients by way of it (see `ExpertRows`).

        adapters: on the stacked matrices, of a layer whose router asks for no cosines.

        Raises:
            ValueError: a plan for another number of experts.
        """
        if len(rows.plan.stop_E) != self.w1.shape[0]:
            raise ValueError(f"a plan for {len(rows.plan.stop_E)} experts; there are {self.w1.shape[0]}")
        # The weights' own type decides, also under autocast, which knows nothing of results written in place.
        with torch.autocast(rows.x_ND.device.type, enabled=False):
            x_ND = rows.x_ND.to(self.w1.dtype)
            if adapters is not None:
                out_ND = self._adapted(x_ND, rows, adapters)
            elif rows.probe_NK is not None and rows.probe_NK.requires_grad:
                out_ND = self._probed(x_ND, rows)
            else:
                out_ND = self._plain(x_ND, rows)
        return out_ND.to(rows.x_ND.dtype)

    def _stacks(self) -> Stacks:
        return Stacks(self.w1, self.w2, self.w3, self.b1, self.b2, self.b3)

    def _plain(self, x_ND: Tensor, rows: ExpertRows) -> Tensor:
        if x_ND.is_cuda and self.b1 is None:
            from moe_lvlm.moe.fused import (  # Triton, which builds of torch without CUDA do not bring
                can_compute,
                compute,
            )

            if can_compute(self.activation, x_ND.dtype):
                return compute(x_ND, rows.plan, rows.weights_NK, self.activation, self.w1, self.w2, self.w3)
        return RoutedFFN.apply(x_ND, rows.weights_NK, rows.plan.counted(), self.act, *self._stacks())

    def _probed(self, x_ND: Tensor, rows: ExpertRows) -> Tensor:
        assert rows.probe_NK is not None
        plan = rows.plan.counted()
        out_RD = ProbedFFN.apply(
            take_rows(x_ND, plan),
            take_slots(rows.weights_NK, plan),
            take_slots(rows.probe_NK, plan),
            rows.counts_by_source or tuple((count,) for count in plan.host_counts),
            self.act,
            *self._stacks(),
        )
        return add_rows(out_RD, plan, out_RD.dtype)

    def _adapted(self, x_ND: Tensor, rows: ExpertRows, adapters: ExpertAdapters) -> Tensor:
        """The same step by step, with what the adapters add to each product. Keeps up to four numbers a row and hidden
        unit where `RoutedFFN` keeps two."""
        assert rows.probe_NK is None or not rows.probe_NK.requires_grad, "attach refuses routers that ask for cosines"
        plan = rows.plan.counted()
        counts = plan.host_counts
        lora = None if rows.lora is None else rows.lora.of_rows(plan.source_R)
        x_RD = take_rows(x_ND, plan)
        product_RF = multiply_rows(x_RD, self.w1, self.b1, counts=counts)
        hidden_RF = self.act(adapters.add("w1", product_RF, x_RD, counts, lora))
        if self.w3 is not None:
            product_RF = multiply_rows(x_RD, self.w3, self.b3, counts=counts)
            hidden_RF = hidden_RF * adapters.add("w3", product_RF, x_RD, counts, lora)
        product_RD = multiply_rows(hidden_RF, self.w2, self.b2, counts=counts)
        out_RD = adapters.add("w2", product_RD, hidden_RF, counts, lora)
        out_RD = out_RD * take_slots(rows.weights_NK, plan)[:, None].to(out_RD.dtype)
        return add_rows(out_RD, plan, out_RD.dtype)


def multiply_rows(
    x_RI: Tensor,
    stack: Tensor,
    bias_GO: Tensor | None = None,
    *,
    counts: tuple[int, ...],
    row_A: Tensor | None = None,
) -> Tensor:
    """Products [A, O] of rows with the matrix of their group, plus its bias; a tensor of its own, no view.

    stack: [..., O, I], G matrices. counts: rows of each group, which stand one after the other. row_A: int64, which row
    of x each of them is, no row twice in a group; None where they are the rows of x in their order.
    """
    return _GroupedProduct.apply(x_RI, row_A, stack, bias_GO, counts)


class _GroupedProduct(torch.autograd.Function):
    """Group by group; gathered rows are gathered again in the backward pass, and parameters are saved whole as above.
    Frozen matrices, as those beside a LoRA are, need no rows for their gradient, and none are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        row_A: Tensor | None,
        stack: Tensor,
        bias_GO: Tensor | None,
        counts: tuple[int, ...],
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x_RI if needs[2] else None, row_A, stack)
        ctx.counts, ctx.num_rows = counts, x_RI.shape[0]
        ctx.bias_shape = None if bias_GO is None else bias_GO.shape
        matrices_GOI = stack.reshape(-1, *stack.shape[-2:])
        out_AO = x_RI.new_empty(sum(counts), stack.shape[-2])
        for group, rows in row_slices(counts):
            x_AI = x_RI[rows if row_A is None else row_A[rows]]
            if bias_GO is None:
                torch.mm(x_AI, matrices_GOI[group].t(), out=out_AO[rows])
            else:
                torch.addmm(bias_GO[group], x_AI, matrices_GOI[group].t(), out=out_AO[rows])
        return out_AO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, row_A, stack = ctx.saved_tensors
        grad_AO, needs = grads[0], ctx.needs_input_grad
        matrices_GOI = stack.reshape(-1, *stack.shape[-2:])
        # Groups without a row must still give a gradient (of 0): every rank reduces the same buckets.
        grad_x_RI = grad_AO.new_zeros(ctx.num_rows, stack.shape[-1]) if needs[0] else None
        grad_stack_GOI = torch.zeros_like(matrices_GOI) if needs[2] else None
        grad_bias_GO = grad_AO.new_zeros(ctx.bias_shape) if needs[3] else None
        for group, rows in row_slices(ctx.counts):
            if grad_x_RI is not None and row_A is None:
                torch.mm(grad_AO[rows], matrices_GOI[group], out=grad_x_RI[rows])
            elif grad_x_RI is not None:
                grad_x_RI.index_add_(0, row_A[rows], grad_AO[rows] @ matrices_GOI[group])
            if grad_stack_GOI is not None:
                x_AI = x_RI[rows if row_A is None else row_A[rows]]
                sum_products(grad_AO[rows], x_AI, out=grad_stack_GOI[group])
            if grad_bias_GO is not None:
                sum_products(grad_AO[rows], None, out=grad_bias_GO[group])
        grad_stack = None if grad_stack_GOI is None else grad_stack_GOI.view(stack.shape)
        return grad_x_RI, None, grad_stack, grad_bias_GO, None


class RoutedFFN(torch.autograd.Function):
    """Expert by expert, saving only x and the two products before the activation; the rest is computed again, and rows
    are taken out of x again.

    No output is kept for the gradient of the router's weight, which is taken at the hidden row. The weight itself is
    applied at width D, never at width F: to the output, and in the backward pass to the rows and their gradients.
    A parameter is saved whole, never a view of it: ZeRO-3 takes its storage away after the forward pass and gives it
    back before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        plan: RowPlan,
        act: Activation,
        *parameters: Any,
    ) -> Tensor:
        stacks = Stacks(*parameters)
        source_R, weights_R = plan.source_R, take_slots(weights_NK, plan)
        hidden = allocate_hidden(x_ND, len(source_R), stacks)
        sum_ND = start_sum(x_ND, plan)
        for expert, rows in row_slices(plan.host_counts):
            x_RD = x_ND.index_select(0, source_R[rows])
            out_RD = forward_rows(expert, x_RD, weights_R[rows], act=act, stacks=stacks, hidden=hidden.of(rows))
            add_to_sum(sum_ND, out_RD, source_R[rows])
        save_plan(ctx, plan, x_ND, weights_NK, *hidden, *stacks)
        ctx.act = act
        return sum_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, (x_ND, weights_NK, gate_RF, up_RF, *parameters) = saved_plan(ctx)
        stacks, hidden, needs = Stacks(*parameters), Hidden(gate_RF, up_RF), ctx.needs_input_grad
        source_R, weights_R = plan.source_R, take_slots(weights_NK, plan)
        gradients = StackGradients(stacks, plan.host_counts, needs[4:])
        grad_sum_ND = start_sum(x_ND, plan) if needs[0] else None
        grad_weights_NK = torch.zeros_like(weights_NK) if needs[1] else None
        for expert, rows in row_slices(plan.host_counts):
            grad_x_RD, grad_weights_R = backward_rows(
                expert,
                x_RD=x_ND.index_select(0, source_R[rows]),
                weights_R=weights_R[rows],
                hidden=hidden.of(rows),
                grad_out_RD=grads[0].index_select(0, source_R[rows]),
                act=ctx.act,
                stacks=stacks,
                needs_x=needs[0],
                needs_weights=needs[1],
                take=gradients.taker(expert),
            )
            if grad_sum_ND is not None and grad_x_RD is not None:
                add_to_sum(grad_sum_ND, grad_x_RD, source_R[rows])
            if grad_weights_NK is not None and grad_weights_R is not None:
                grad_weights_NK.view(-1).index_copy_(0, plan.slot_R[rows].long(), grad_weights_R)
        grad_x_ND = None if grad_sum_ND is None else grad_sum_ND.to(x_ND.dtype)
        return (grad_x_ND, grad_weights_NK, None, None, *gradients.in_order())
