"""Attention within the samples of a packed row: its cost is the sum of their squares, and no mask of the row exists.

N positions of the row   n samples   H query heads   K key-value heads   h width of a head
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WITHIN_SAMPLES = "sdpa_within_samples"
"""The name under which transformers finds it: stock sdpa, unless the mask says where samples begin."""

PACKED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "stablelm", "opt"})
"""`model_type` of the language models that are known to be right on packed rows."""

# Of the mask that says where samples begin; transformers' own are bool or floating.
_BOUNDS = torch.int32

# torch 2.12 asks for it where key-value heads are fewer; before, the argument is not there and heads are repeated.
_HAS_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_HALF = (torch.bfloat16, torch.float16)
# Of the flash kernels behind `varlen_attn`.
_WIDEST_HEAD, _HEAD_STEP, _FLASH_CAPABILITY = 256, 8, (8, 0)

VarlenKernel = Callable[..., Any]


class PackedInputs(NamedTuple):
    """What a decoder is told of a packed row: its attention_mask, and arguments that its layers hand to flash attention
    (StableLM's dense layers do not: there transformers finds the samples by their positions, a look at the device each)."""

    attention_mask: Tensor | None
    arguments: dict[str, Any]


def attend_within_samples(decoder: PreTrainedModel) -> None:
    """Let a language model that uses sdpa take packed rows; eager and flash attention take them as they are.

    Raises:
        ValueError: another family than those of `PACKED_FAMILIES`.
    """
    check_family(decoder.config)
    if decoder.config._attn_implementation == "sdpa":
        decoder.set_attn_implementation(WITHIN_SAMPLES)


def check_family(config: PreTrainedConfig) -> None:
    """Raises ValueError for a language model that cannot take packed rows."""
    if config.model_type not in PACKED_FAMILIES:
        raise ValueError(
            f"data.batching: packed, but the language model is {config.model_type!r}; allowed with it: "
            f"{', '.join(sorted(PACKED_FAMILIES))}, or data.batching: padded"
        )


def packed_inputs(
    config: PreTrainedConfig,
    sample_lengths: tuple[int, ...],
    *,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    is_routed_blindly: bool,
) -> PackedInputs:
    """What the decoder with this configuration is told of one row [1, N] that holds these samples one after the other.

    position_ids: [1, N], from 0 in each sample. is_routed_blindly: the model routes, but got no routing context.

    Raises:
        ValueError: lengths that are not those of one row, missing ids or a mask, no routing context for a model that
            routes, or an attention that does not keep samples apart.
    """
    if input_ids is None or position_ids is None or attention_mask is not None:
        raise ValueError("sample_lengths: a packed row needs input_ids and position_ids, and takes no attention_mask")
    if is_routed_blindly:
        raise ValueError(
            "sample_lengths: a packed row needs a routing context; without one the row is taken for one sample"
        )
    if min(sample_lengths, default=0) < 1 or tuple(input_ids.shape) != (1, sum(sample_lengths)):
        raise ValueError(
            f"sample_lengths: {len(sample_lengths)} samples of {sum(sample_lengths)} tokens for input_ids of shape "
            f"{tuple(input_ids.shape)}; allowed: one row, [1, sum of lengths], each at least 1"
        )
    attention = config._attn_implementation
    if attention == "eager":  # transformers makes a block-diagonal mask of the positions
        return PackedInputs(None, {})
    bounds = torch.tensor([0, *accumulate(sample_lengths)], dtype=_BOUNDS)
    if attention == "flash_attention_2":
        longest = max(sample_lengths)
        bounds = bounds.to(input_ids.device, non_blocking=True)
        return PackedInputs(
            None,
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
        )
    if attention == WITHIN_SAMPLES:
        # On the host, where layers read it without waiting for the device. Of four dimensions, since transformers hands
        # such a mask on as it is and makes none of its own; not an argument, since not all layers hand those on.
        return PackedInputs(bounds[None, None, None], {})
    raise ValueError(
        f"sample_lengths: attention {attention!r} does not keep the samples of a row apart; allowed: "
        f"{WITHIN_SAMPLES} (`attend_within_samples`), eager, flash_attention_2"
    )


def attention_within_samples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one layer, by transformers' interface: query [1, H, N, h], key and value [1, K, N, h], to
    [1, N, H, h].

    attention_mask: int32 [1, 1, 1, n + 1] on the host, where samples begin and end (`packed_inputs`); with any other this
    is transformers' sdpa. sliding_window: how many tokens a token sees, itself among them.
    """
    if attention_mask is None or attention_mask.dtype != _BOUNDS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    bounds = attention_mask.flatten()
    lengths: list[int] = bounds.diff().tolist()
    longest = max(lengths)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if _fits_varlen(query, value, dropout):
        bounds = bounds.to(query.device, non_blocking=True)
        return attend_at_once(query, key, value, bounds, longest=longest, scaling=scaling, window=window), None
    parts = [
        sdpa_attention_forward(
            module, *one, _band(one[0].shape[2], window, query.device), dropout=dropout, scaling=scaling, **kwargs
        )[0]
        for one in zip(*(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _fits_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _HALF
        and dropout == 0  # the kernel has none
        and width == value.shape[-1] <= _WIDEST_HEAD
        and width % _HEAD_STEP == 0
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    *,
    longest: int,
    scaling: float | None,
    window: int | None,
    kernel: VarlenKernel = varlen_attn,
) -> Tensor:
    """All samples in one call of flash attention. bounds: int32 [n + 1]. window: None where no sample is longer.

    kernel: `varlen_attn`, or what computes the same elsewhere.
    """
    grouped: dict[str, Any] = {}
    if (num_groups := query.shape[1] // key.shape[1]) > 1:
        if _HAS_GROUPED_HEADS:
            grouped = {"enable_gqa": True}
        else:
            key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    rows = [whole[0].transpose(0, 1) for whole in (query, key, value)]
    left = -1 if window is None else window - 1  # the kernel does not count the token itself
    attended: Tensor = kernel(*rows, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **grouped)
    return attended[None]


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [1, 1, length, length], the last `window` tokens of each; None where that is all before it."""
    if window is None or length <= window:
        return None
    is_seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return is_seen.tril().triu(1 - window)[None, None]


AttentionInterface.register(WITHIN_SAMPLES, attention_within_samples)
AttentionMaskInterface.register(WITHIN_SAMPLES, sdpa_mask)
