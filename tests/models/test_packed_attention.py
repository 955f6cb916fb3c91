"""Attention within the samples of a packed row: against brute force, against transformers' own, and what is refused."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lvlm.models.packed_attention import (
    WITHIN_SAMPLES,
    attend_at_once,
    attend_within_samples,
    attention_within_samples,
    packed_inputs,
)
from moe_lvlm.models.upcycle import as_moe_llava
from tests.models.packed_batches import collate, learn, samples
from tests.tiny_models import collate as collate_rows
from tests.tiny_models import tiny_llava, tiny_moe_blip, tiny_samples

LENGTHS = (3, 1, 9, 6)
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def problem(key_heads: int = KEY_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return query, key, value


def bounds() -> Tensor:
    return torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)


def brute_force(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Token by token and head by head: [1, N, H, h]."""
    sample_of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).tolist()
    group = query.shape[1] // key.shape[1]
    rows = []
    for position in range(query.shape[2]):
        seen = [
            other
            for other in range(position + 1)
            if sample_of[other] == sample_of[position] and (window is None or position - other < window)
        ]
        heads = []
        for head in range(query.shape[1]):
            scores = key[0, head // group, seen] @ query[0, head, position] * scale
            heads.append(scores.softmax(dim=0) @ value[0, head // group, seen])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def module(key_heads: int = KEY_HEADS) -> Any:
    """What transformers' attention functions look at."""
    return SimpleNamespace(num_key_value_groups=HEADS // key_heads, is_causal=True, training=True)


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
@pytest.mark.parametrize("window", [None, 4, 20])
def test_equals_brute_force(key_heads: int, window: int | None) -> None:
    given = problem(key_heads)
    expected = brute_force(*given, window, scale=0.3)
    found, weights = attention_within_samples(
        module(key_heads), *given, bounds()[None, None, None], scaling=0.3, sliding_window=window
    )
    assert weights is None
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), given),
        torch.autograd.grad((expected * direction).sum(), given),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's documentation says of `varlen_attn`, [N, H, h]: a window (left, right) beside the token, -1 for all."""
    assert bounds_q is bounds_k and longest_q == longest_k == max(bounds_q.diff().tolist())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    parts = []
    for start, stop in zip(bounds_q.tolist(), bounds_q.tolist()[1:], strict=False):
        place = torch.arange(stop - start)
        distance = place[:, None] - place[None, :]
        is_seen = (distance <= left if left >= 0 else distance == distance) & (
            -distance <= right if right >= 0 else distance == distance
        )
        one, keys, values = (whole[start:stop].transpose(0, 1)[None] for whole in (query, key, value))
        attended = scaled_dot_product_attention(one, keys, values, is_seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
@pytest.mark.parametrize("window", [None, 4])
def test_the_call_of_the_flash_kernel(key_heads: int, window: int | None) -> None:
    """By a reference of the kernel, which itself runs on a GPU only."""
    given = problem(key_heads)
    found = attend_at_once(*given, bounds(), longest=max(LENGTHS), scaling=0.3, window=window, kernel=varlen_reference)
    assert_close(found, brute_force(*given, window, scale=0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
@pytest.mark.parametrize("window", [None, 4])
def test_torchs_kernel_takes_the_call(key_heads: int, window: int | None) -> None:
    """Its arguments and shapes, forward and backward, without computing: meta tensors."""
    given = [whole.detach().to("meta", torch.bfloat16).requires_grad_() for whole in problem(key_heads)]
    query, key, value = given
    found = attend_at_once(query, key, value, bounds().to("meta"), longest=max(LENGTHS), scaling=0.3, window=window)
    assert found.shape == (1, sum(LENGTHS), HEADS, WIDTH)
    found.sum().backward()
    assert all(whole.grad is not None and whole.grad.shape == whole.shape for whole in given)


def test_dropout_is_that_of_each_sample() -> None:
    given = problem(HEADS)
    torch.manual_seed(3)
    found, _ = attention_within_samples(module(HEADS), *given, bounds()[None, None, None], dropout=0.5, scaling=0.3)
    torch.manual_seed(3)
    parts = [
        scaled_dot_product_attention(*one, dropout_p=0.5, scale=0.3, is_causal=one[0].shape[2] > 1).transpose(1, 2)
        for one in zip(*(whole.split(LENGTHS, dim=2) for whole in given), strict=True)
    ]
    assert_close(found, torch.cat(parts, dim=1))


def test_other_calls_are_stock_sdpa() -> None:
    """Padded batches and generation, in training mode and not, bit for bit."""
    stock, ours = (as_moe_llava(tiny_llava("mistral")) for _ in range(2))
    attend_within_samples(ours.get_decoder())
    assert ours.get_decoder().config._attn_implementation == WITHIN_SAMPLES
    assert ours.config.vision_config._attn_implementation == "sdpa"
    for side in ("left", "right"):
        batch = collate_rows(tiny_samples(), side=side)
        assert torch.equal(ours(**batch).logits, stock(**batch).logits)
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        found, expected = (model.generate(**prompt, max_new_tokens=4, do_sample=False) for model in (ours, stock))
        assert torch.equal(found, expected)
    assert "within" not in ours.config.to_json_string()


class Shapes(TorchDispatchMode):
    """All shapes that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(one.shape) for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor)}
        return result


@pytest.mark.parametrize("attention", [WITHIN_SAMPLES, "eager"])
def test_no_mask_of_the_row_is_made(attention: str) -> None:
    model = as_moe_llava(tiny_llava("mistral")).train()
    model.get_decoder().set_attn_implementation(attention)
    batch = collate(samples(), is_packed=True)
    num_positions = batch["input_ids"].numel()
    with Shapes() as shapes:
        learn(model, batch)
    is_made = any(shape[-2:] == (num_positions, num_positions) for shape in shapes.seen)
    assert is_made == (attention == "eager")  # which does make one, so it would show


def test_a_sample_knows_nothing_of_its_neighbours() -> None:
    """Logits of a packed row are those of each sample alone, whatever stands before it."""
    model = as_moe_llava(tiny_llava())
    attend_within_samples(model.get_decoder())
    of = samples()
    together = model(**collate(of, is_packed=True)).logits[0]
    for place, sample in enumerate(of):
        alone = model(**collate([sample], is_packed=True)).logits[0]
        start = sum(len(other.input_ids) for other in of[:place])
        assert_close(together[start : start + len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_flash_attention_is_told_as_transformers_wants_it() -> None:
    ids = torch.zeros(1, sum(LENGTHS), dtype=torch.long)
    config = tiny_llava().config.text_config
    config._attn_implementation_internal = "flash_attention_2"  # the setter would look for the package
    mask, arguments = packed_inputs(
        config, LENGTHS, input_ids=ids, position_ids=ids, attention_mask=None, is_routed_blindly=False
    )
    assert mask is None
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 4, 13, 19]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 5)}, "takes no attention_mask"),
        ({"position_ids": None}, "needs input_ids and position_ids"),
        ({"is_routed_blindly": True}, "needs a routing context"),
        ({"sample_lengths": (3, 3)}, r"2 samples of 6 tokens for input_ids of shape \(1, 5\)"),
        ({"sample_lengths": (5, 0)}, "each at least 1"),
        ({"sample_lengths": ()}, "0 samples of 0 tokens"),
        ({"input_ids": torch.zeros(2, 5)}, r"shape \(2, 5\)"),
        ({}, "attention 'sdpa' does not keep the samples of a row apart"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "sample_lengths": (2, 3),
        "input_ids": torch.zeros(1, 5),
        "position_ids": torch.zeros(1, 5),
        "attention_mask": None,
        "is_routed_blindly": False,
    }
    with pytest.raises(ValueError, match=message):
        packed_inputs(tiny_llava().config.text_config, **(given | changes))


def test_an_unknown_language_model_is_refused() -> None:
    decoder: nn.Module = tiny_moe_blip(None, "t5").get_decoder()
    with pytest.raises(
        ValueError, match=r"data.batching: packed, but the language model is 't5'; allowed with it: llama"
    ):
        attend_within_samples(decoder)  # type: ignore[arg-type]
