"""Triton kernels of the experts' path on CUDA: the order of rows, their way to the experts and back, the activation.

What lies between the matrix products is bound by memory and by launches: each kernel reads and writes every number once,
and none needs the host to know how many rows there are. All compute in float32 and store in the type of what they are
given. TRITON_INTERPRET=1 runs them on the CPU.

N rows of x   K slots of each   S = N * K slots   D model width   F FFN width   E experts   R routed rows (or their bound S)
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels for CUDA need triton, which CUDA builds of torch bring") from error

SILU, GELU, GELU_TANH = 0, 1, 2
# Names of transformers' ACT2FN.
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu": GELU, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}
_PLAN_TILE = 32_768  # slots x experts of one program of the plan's kernels
_PLAN_SLOTS = 512  # at most, of one program
_ELEMENTS = 4096  # of one program of the activation
_COLUMNS = 2048  # at a time, of one row


@triton.jit
def _count_kernel(  # type: ignore[no-untyped-def]
    id_ptr, keep_ptr, count_ptr, num_slots, num_blocks, E: tl.constexpr, E_PADDED: tl.constexpr, SLOTS: tl.constexpr
):
    """Kept slots of each expert in a block of slots, [E, blocks]."""
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    is_kept = tl.load(keep_ptr + slot, mask=slot < num_slots, other=0) != 0
    expert = tl.load(id_ptr + slot, mask=is_kept, other=-1).to(tl.int32)
    column = tl.arange(0, E_PADDED)
    is_of = (expert[:, None] == column[None, :]).to(tl.int32)
    tl.store(count_ptr + column * num_blocks + block, tl.sum(is_of, 0), mask=column < E)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    id_ptr, keep_ptr, count_ptr, stop_ptr, row_ptr, slot_ptr,
    num_slots, num_blocks, E: tl.constexpr, E_PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The row of each slot, and the slot of each row. stop: where the rows of an expert and block end, [E, blocks]."""
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    is_kept = tl.load(keep_ptr + slot, mask=inside, other=0) != 0
    expert = tl.load(id_ptr + slot, mask=is_kept, other=-1).to(tl.int32)
    column = tl.arange(0, E_PADDED)
    is_of = (expert[:, None] == column[None, :]).to(tl.int32)
    at = column * num_blocks + block
    start = tl.load(stop_ptr + at, mask=column < E, other=0) - tl.load(count_ptr + at, mask=column < E, other=0)
    row = tl.sum(is_of * (start[None, :] + tl.cumsum(is_of, 0) - 1), 1)
    tl.store(row_ptr + slot, tl.where(is_kept, row, -1), mask=inside)
    tl.store(slot_ptr + row, slot, mask=is_kept)


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr, slot_ptr, stop_ptr, out_ptr, width, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(stop_ptr + E - 1):
        source = (tl.load(slot_ptr + row) // K).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        tl.store(out_ptr + row * width + column, tl.load(x_ptr + source * width + column, mask=inside), mask=inside)


@triton.jit
def _sum_kernel(row_ptr, place_ptr, out_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    source = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(place_ptr + source * K + slot).to(tl.int64)
        is_here = inside & (row >= 0)
        total += tl.load(row_ptr + row * width + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out_ptr + source * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation at x, and its derivative."""
    if KIND == 0:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if KIND == 1:
        c = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * c, c + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = 2 * tl.sigmoid(2 * inner) - 1  # tanh
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


@triton.jit
def _activate_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, weight_ptr, slot_ptr, stop_ptr, out_ptr,
    E: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // WIDTH
    inside = row < tl.load(stop_ptr + E - 1)
    slot = tl.load(slot_ptr + row, mask=inside, other=0)
    hidden, _ = _activation(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        hidden *= tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    hidden *= tl.load(weight_ptr + slot, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, grad_ptr, weight_ptr, slot_ptr, stop_ptr, hidden_ptr, grad_gate_ptr, grad_up_ptr, grad_weight_ptr,
    E: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(stop_ptr + E - 1):
        slot = tl.load(slot_ptr + row)
        weight = tl.load(weight_ptr + slot).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            at = row * WIDTH + column
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            hidden, slope = _activation(gate, KIND)
            if GATED:
                up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_up_ptr + at, (grad * hidden * weight).to(grad_up_ptr.dtype.element_ty), mask=inside)
                hidden *= up
                slope *= up
            total += grad * hidden
            tl.store(hidden_ptr + at, (hidden * weight).to(hidden_ptr.dtype.element_ty), mask=inside)
            tl.store(grad_gate_ptr + at, (grad * slope * weight).to(grad_gate_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_weight_ptr + slot, tl.sum(total, 0).to(grad_weight_ptr.dtype.element_ty))


def plan(expert_ids_NK: Tensor, keep_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a `RowPlan`, all int32: slot_R [S], undefined after the last row, row_NK, and stop_E."""
    num_slots, device = keep_NK.numel(), keep_NK.device
    padded = triton.next_power_of_2(num_experts)
    slots = max(16, min(_PLAN_SLOTS, _PLAN_TILE // padded))
    num_blocks = max(1, triton.cdiv(num_slots, slots))
    ids_NK, keep_NK = expert_ids_NK.contiguous(), keep_NK.contiguous()
    count_EB = torch.empty((num_experts, num_blocks), dtype=torch.int32, device=device)
    row_NK = torch.empty(keep_NK.shape, dtype=torch.int32, device=device)
    slot_R = torch.empty(num_slots, dtype=torch.int32, device=device)
    sizes = (num_slots, num_blocks, num_experts, padded, slots)
    _count_kernel[(num_blocks,)](ids_NK, keep_NK, count_EB, *sizes)
    stop_EB = count_EB.flatten().cumsum(0, dtype=torch.int32).view_as(count_EB)
    _place_kernel[(num_blocks,)](ids_NK, keep_NK, count_EB, stop_EB, row_NK, slot_R, *sizes)
    return slot_R, row_NK, stop_EB[:, -1].contiguous()


def gather_rows(x_ND: Tensor, slot_R: Tensor, row_NK: Tensor, stop_E: Tensor) -> Tensor:
    """Each routed row's x, [R, D]; rows after the last are left undefined."""
    x_ND = x_ND.contiguous()
    num_rows, width = len(slot_R), x_ND.shape[1]
    out_RD = x_ND.new_empty((num_rows, width))
    if num_rows:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        grid = (num_rows, triton.cdiv(width, block))
        _gather_kernel[grid](x_ND, slot_R, stop_E, out_RD, width, len(stop_E), row_NK.shape[1], block)
    return out_RD


def sum_rows(y_RD: Tensor, row_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the rows of each row of x, [N, D], slot by slot: the same in every run."""
    y_RD = y_RD.contiguous()
    (num_sources, K), width = row_NK.shape, y_RD.shape[1]
    out_ND = y_RD.new_empty((num_sources, width), dtype=dtype)
    if num_sources:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        _sum_kernel[(num_sources, triton.cdiv(width, block))](y_RD, row_NK, out_ND, width, K, block)
    return out_ND


def activate(
    gate_RF: Tensor, up_RF: Tensor | None, weights_NK: Tensor, slot_R: Tensor, stop_E: Tensor, kind: int
) -> Tensor:
    """Weighted hidden rows [R, F]: weight act(gate) * up, without `up` where the FFN is not gated."""
    out_RF = torch.empty_like(gate_RF)
    if gate_RF.numel():
        grid = (triton.cdiv(gate_RF.numel(), _ELEMENTS),)
        _activate_kernel[grid](
            gate_RF, gate_RF if up_RF is None else up_RF, weights_NK, slot_R, stop_E, out_RF,
            len(stop_E), gate_RF.shape[1], kind, up_RF is not None, _ELEMENTS, num_warps=8,
        )  # fmt: skip
    return out_RF


def activate_backward(
    gate_RF: Tensor,
    up_RF: Tensor | None,
    weights_NK: Tensor,
    grad_RF: Tensor,
    slot_R: Tensor,
    stop_E: Tensor,
    kind: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Of the gradient of `activate`'s output before its weight: weighted hidden rows again, the gradients of gate and
    up (in the memory of `grad_RF`), and of the weights [N, K], 0 where no slot is kept."""
    hidden_RF, grad_gate_RF = torch.empty_like(gate_RF), torch.empty_like(gate_RF)
    grad_weights_NK = torch.zeros_like(weights_NK)
    if gate_RF.numel():
        _activate_backward_kernel[(gate_RF.shape[0],)](
            gate_RF, gate_RF if up_RF is None else up_RF, grad_RF, weights_NK, slot_R, stop_E,
            hidden_RF, grad_gate_RF, grad_RF, grad_weights_NK,
            len(stop_E), gate_RF.shape[1], kind, up_RF is not None, _COLUMNS, num_warps=8,
        )  # fmt: skip
    return hidden_RF, grad_gate_RF, None if up_RF is None else grad_RF, grad_weights_NK
