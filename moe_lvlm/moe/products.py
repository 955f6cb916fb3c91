"""Products of rows with the matrix of their expert, and their gradients on it: the ways there are on a GPU.

A loop makes one call of cuBLAS an expert, for which the host must have counted the rows; a grouped kernel does all
experts at once and reads on the device where their rows end.

E experts held here   I inputs, O outputs   R routed rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from moe_lvlm.moe.grouped import row_slices
from moe_lvlm.moe.rows import RowPlan

# Multiplications of one expert's product from which a loop is ahead of one grouped kernel (H100: docs/performance.md).
LOOP_WORK = 3e10


class Products(NamedTuple):
    """How the products of one layer are made. is_grouped: those with rows; is_outer_grouped: sums over rows."""

    plan: RowPlan
    is_grouped: bool
    is_outer_grouped: bool

    def of(self, x_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        """Rows times their expert's matrix, [R, O]."""
        if self.is_grouped:
            return grouped_mm(x_RI, stack_EIO, offs=self.plan.stop_E)
        out_RO = x_RI.new_empty(x_RI.shape[0], stack_EIO.shape[2])
        for expert, rows in row_slices(self.plan.host_counts):
            torch.mm(x_RI[rows], stack_EIO[expert], out=out_RO[rows])
        return out_RO

    def add(self, out_RO: Tensor, x_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        """The same added to `out`, in place."""
        if self.is_grouped:
            return out_RO.add_(grouped_mm(x_RI, stack_EIO, offs=self.plan.stop_E))
        for expert, rows in row_slices(self.plan.host_counts):
            out_RO[rows].addmm_(x_RI[rows], stack_EIO[expert])
        return out_RO

    def outer(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sums over each expert's rows of grad x^T, [E, O, I]; 0 for an expert without a row."""
        if self.is_outer_grouped:
            return grouped_mm(grad_RO.t(), x_RI, offs=self.plan.stop_E)
        counts = self.plan.host_counts
        out = grad_RO.new_empty(len(counts), grad_RO.shape[1], x_RI.shape[1])
        for expert, count in enumerate(counts):
            if count == 0:
                out[expert] = 0
        for expert, rows in row_slices(counts):
            torch.mm(grad_RO[rows].t(), x_RI[rows], out=out[expert])
        return out


def choose_products(plan: RowPlan, stack: Tensor) -> Products:
    """The fastest way for a number of rows. stack: parameters of the experts, [E, ., .].

    The host looks at the counts only where it must: where there is no grouped kernel. Where it knows them anyway, large
    products are made by a loop. A look for the loop's sake gains nothing: what its products gain, waiting loses.
    """
    if not has_grouped_kernel(stack):
        return Products(plan.counted(), is_grouped=False, is_outer_grouped=False)
    rows_each, matrix_size = len(plan.slot_R) / len(stack), stack[0].numel()
    is_grouped = plan.counts is None or rows_each * matrix_size < LOOP_WORK
    return Products(plan, is_grouped, is_outer_grouped=True)


def has_grouped_kernel(stack: Tensor) -> bool:
    """Whether torch's grouped product is one kernel for these matrices; elsewhere it is a loop of its own, or an error."""
    is_aligned = all(width * stack.element_size() % 16 == 0 for width in stack.shape[1:])
    has_kernel = stack.is_cuda and torch.cuda.get_device_capability(stack.device)[0] >= 9
    return is_aligned and has_kernel and stack.dtype == torch.bfloat16
