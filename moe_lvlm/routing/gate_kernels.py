"""Triton kernels of a linear gate on CUDA, for half-precision tokens: float32 scores without a float32 copy of them.

The products of two half-precision numbers are exact in float32, and so are the sums as float32 goes; tokens are read once
in either direction. TRITON_INTERPRET=1 runs the kernels on the CPU.

T tokens   D model width   E experts
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels for CUDA need triton, which CUDA builds of torch bring") from error

MOST_EXPERTS = 256
_TOKENS, _COLUMNS = 64, 128  # of one tile


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, T, D: tl.constexpr, E: tl.constexpr,
    E_PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PADDED)
    scores = tl.zeros([TOKENS, E_PADDED], tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_x = (token < T)[:, None] & (column < D)[None, :]
        x = tl.load(x_ptr + token[:, None] * D + column[None, :], mask=is_x, other=0.0)
        is_weight = (expert < E)[None, :] & (column < D)[:, None]
        weight = tl.load(weight_ptr + expert[None, :] * D + column[:, None], mask=is_weight, other=0.0)
        # half-precision numbers are TF32 numbers too, so nothing is rounded here
        scores = tl.dot(x.to(tl.float32), weight.to(tl.float32), scores, input_precision="tf32")
    is_out = (token < T)[:, None] & (expert < E)[None, :]
    tl.store(out_ptr + token[:, None] * E + expert[None, :], scores, mask=is_out)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, part_ptr, T, D: tl.constexpr, E: tl.constexpr,
    E_PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the tokens' gradient, and what its tokens contribute to the weight's, [tiles of tokens, E, D]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.arange(0, E_PADDED)
    is_grad = (token < T)[:, None] & (expert < E)[None, :]
    grad = tl.load(grad_ptr + token[:, None] * E + expert[None, :], mask=is_grad, other=0.0)
    is_weight = (expert < E)[:, None] & (column < D)[None, :]
    at_weight = expert[:, None] * D + column[None, :]
    weight = tl.load(weight_ptr + at_weight, mask=is_weight, other=0.0).to(tl.float32)
    is_x = (token < T)[:, None] & (column < D)[None, :]
    at_x = token[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at_x, mask=is_x, other=0.0).to(tl.float32)
    grad_x = tl.dot(grad, weight, input_precision="ieee")
    tl.store(grad_x_ptr + at_x, grad_x.to(grad_x_ptr.dtype.element_ty), mask=is_x)
    part = tl.dot(tl.trans(grad), x, input_precision="ieee")
    tl.store(part_ptr + block * E * D + at_weight, part, mask=is_weight)


def can_score(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether the kernels are for such tokens and weights."""
    is_half = x_TD.dtype in (torch.bfloat16, torch.float16) and weight_ED.dtype == x_TD.dtype
    return is_half and 0 < len(weight_ED) <= MOST_EXPERTS and len(x_TD) > 0


def score(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Scores x w^T, float32 [T, E]."""
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    (T, D), E = x_TD.shape, len(weight_ED)
    out_TE = torch.empty((T, E), dtype=torch.float32, device=x_TD.device)
    _forward_kernel[(triton.cdiv(T, _TOKENS),)](
        x_TD, weight_ED, out_TE, T, D, E, max(16, triton.next_power_of_2(E)), _TOKENS, _COLUMNS
    )
    return out_TE


def score_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and weight, in their types, from that of the scores."""
    grad_TE, x_TD, weight_ED = grad_TE.contiguous(), x_TD.contiguous(), weight_ED.contiguous()
    (T, D), E = x_TD.shape, len(weight_ED)
    blocks = triton.cdiv(T, _TOKENS)
    grad_x_TD = torch.empty_like(x_TD)
    part_BED = torch.empty((blocks, E, D), dtype=torch.float32, device=x_TD.device)
    _backward_kernel[(blocks, triton.cdiv(D, _COLUMNS))](
        grad_TE, x_TD, weight_ED, grad_x_TD, part_BED, T, D, E, max(16, triton.next_power_of_2(E)), _TOKENS, _COLUMNS
    )
    return grad_x_TD, part_BED.sum(dim=0).to(weight_ED.dtype)
