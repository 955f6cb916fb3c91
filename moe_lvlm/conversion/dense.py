"""A sparse model of ours becomes a dense one: the inverse of cutting experts from a dense FFN."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.folder import Converted, open_model
from moe_lvlm.conversion.stock import stock_form, stock_source
from moe_lvlm.conversion.target import LastRead, build_target
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.weights import ffn_layout
from moe_lvlm.moe.decoder import MoEDecoderLayer
from moe_lvlm.moe.ffn import FFNLayout, dense_names


@dataclass(frozen=True, slots=True)
class Merge:
    """How the experts of a layer become one FFN.

    group: None takes the mean of all. A number takes one group of experts alone: expert g, or with fine_grained = m
    the experts g m .. g m + m - 1, which are the m slices of an FFN.
    """

    group: int | None = None

    @staticmethod
    def parse(text: str) -> Merge:
        """`mean` or `expert:<g>`. Raises ValueError on any other."""
        if text == "mean":
            return Merge()
        if found := re.fullmatch(r"expert:(\d+)", text):
            return Merge(int(found[1]))
        raise ValueError(f"merge: {text!r}; allowed: mean, or expert:<g> such as expert:2")


def dense_folder(path: str | Path, merge: Merge, *, is_plain: bool = False) -> Converted:
    """A sparse run, checkpoint or model folder as a dense model. is_plain: in transformers' own names and class.

    Raises:
        ValueError: a model that is dense already, has shared experts, or, for `is_plain`, a head with a bias.
    """
    opened = open_model(path)
    config, weights = merge_experts(opened.config, opened.weights, merge)
    notes = () if merge.group is None else (f"experts of group {merge.group} only: what the others learnt is dropped",)
    dense = Converted(
        config=config, weights=weights, processor=opened.processor, before=opened.config.to_dict(), notes=notes
    )
    return as_plain_llava(dense) if is_plain else dense


def as_plain_llava(dense: Converted) -> Converted:
    """A dense model of ours as `LlavaForConditionalGeneration` on the disk, for plain transformers.

    Raises:
        ValueError: a head with a bias, which that class has not.
    """
    assert isinstance(dense.config, MoELlavaConfig) and dense.config.moe is None
    form = stock_form(dense.config)
    return Converted(
        config=form.config,
        weights=stock_source(dense.config, form, dense.weights),
        processor=dense.processor,
        before=dense.before,
        notes=(*dense.notes, *form.caveats),
    )


def merge_experts(config: MoELlavaConfig, source: WeightSource, merge: Merge) -> tuple[MoELlavaConfig, LazySource]:
    """Each layer's experts as one FFN of the width that they were cut from.

    Slice j of the FFN is the mean of the experts j, j + m, j + 2m, ... (m = fine_grained), or the one of them that
    `merge` picks: rows of gate and up, columns of down. Experts that the router `dynamic` has dropped take no part. The down biases of the slices are added up, since each has its
    share. Means are exact where the experts are equal, so that upcycling and then this gives the dense weights back
    (biases too where m is a power of two). Routers are left out.

    Raises:
        ValueError: the model is dense, has shared experts (their sum with routed ones is an FFN of another width), or
            `merge` picks a group that it has not, or whose experts were dropped.
    """
    moe = config.moe_config
    if moe is None:
        raise ValueError("the model is dense already")
    if moe.shared_experts:
        raise ValueError(
            f"shared_experts: {moe.shared_experts}: every token passes them beside its experts, and their sum is no FFN "
            "of the dense width; allowed: models without shared experts"
        )
    num_groups = moe.num_experts // moe.fine_grained
    if merge.group is not None and merge.group >= num_groups:
        raise ValueError(f"merge: expert:{merge.group}; allowed: 0 to {num_groups - 1}")
    dense = config.with_moe(None)
    layers = {
        f"{name}.mlp.": ffn_layout(layer)
        for name, layer in build_target(config).model.named_modules()
        if isinstance(layer, MoEDecoderLayer)
    }
    target = build_target(dense)
    tensors = target.adopt(source, (), is_wanted=lambda name: not name.startswith(tuple(layers)), own_rules=())
    last = LastRead()
    for prefix, layout in layers.items():
        tensors |= _ffn_tensors(
            prefix, layout, _ExpertReader(source, prefix, moe, merge), frozenset(target.shapes), last
        )
    return dense, target.complete(tensors)


class _ExpertReader:
    """One layer's experts as parameters of one FFN."""

    def __init__(self, source: WeightSource, prefix: str, moe: MoEConfig, merge: Merge) -> None:
        self._source, self._prefix, self._merge = source, prefix, merge
        self._fine_grained = moe.fine_grained
        mask = f"{prefix}router.is_active_E"  # of the router `dynamic`, which drops experts in training
        is_active = source.read(mask).tolist() if mask in source.names() else [True] * moe.num_experts
        self._active = [expert for expert, is_used in enumerate(is_active) if is_used]

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Of the dense parameter that w1, ..., b3 were cut from."""
        shape = list(self._source.shape(self._name(leaf))[1:])
        if leaf != "b2":
            shape[1 if leaf == "w2" else 0] *= self._fine_grained
        return tuple(shape)

    def dtype(self, leaf: str) -> torch.dtype:
        return self._source.dtype(self._name(leaf))

    def read(self, leaf: str) -> Tensor:
        """The dense parameter."""
        slices = [self._slice(leaf, index) for index in range(self._fine_grained)]
        if len(slices) == 1:
            return slices[0]
        if leaf == "b2":
            return torch.stack(slices).to(torch.float64).sum(dim=0).to(self.dtype(leaf))
        return torch.cat(slices, dim=1 if leaf == "w2" else 0)

    def _slice(self, leaf: str, index: int) -> Tensor:
        """Slice `index` of the FFN: the mean over its copies, or one of them."""
        if self._merge.group is not None:
            chosen = self._merge.group * self._fine_grained + index
            if chosen not in self._active:
                raise ValueError(
                    f"merge: expert:{self._merge.group}: {self._prefix.removesuffix('.')} has dropped expert {chosen}; "
                    f"allowed: mean, or one of its active experts {self._active}"
                )
            return self._expert(leaf, chosen)
        copies = [expert for expert in self._active if expert % self._fine_grained == index]
        if not copies:
            raise ValueError(
                f"{self._prefix.removesuffix('.')}: no active expert holds slice {index} of the FFN, active are {self._active}"
            )
        # wide enough that a sum of equal numbers is exact, and so is its mean
        wide = torch.float64 if self.dtype(leaf).itemsize >= 4 else torch.float32
        total = self._expert(leaf, copies[0]).to(wide)
        for expert in copies[1:]:
            total += self._expert(leaf, expert)
        return total.div_(len(copies)).to(self.dtype(leaf))

    def _expert(self, leaf: str, expert: int) -> Tensor:
        return self._source.read(self._name(leaf), expert, expert + 1)[0]

    def _name(self, leaf: str) -> str:
        return f"{self._prefix}experts.{leaf}"


def _ffn_tensors(
    prefix: str, layout: FFNLayout, experts: _ExpertReader, wanted: frozenset[str], last: LastRead
) -> dict[str, LazyTensor]:
    """The dense parameters of one layer's FFN."""
    leaves: dict[str, list[str]] = {}
    for leaf in ("w1", "w3", "w2", "b1", "b3", "b2"):  # gate before up: their order in a fused matrix
        if leaf[1] != "3" or layout.is_gated:
            leaves.setdefault(f"{prefix}{dense_names(leaf, layout)}", []).append(leaf)
    return {name: _joined(name, parts, experts, last) for name, parts in leaves.items() if name in wanted}


def _joined(name: str, leaves: list[str], experts: _ExpertReader, last: LastRead) -> LazyTensor:
    """One dense parameter out of one expert parameter, or out of gate and up below each other."""
    shapes = [experts.shape(leaf) for leaf in leaves]

    def compute() -> Tensor:
        parts = [experts.read(leaf) for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return LazyTensor(
        shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
        dtype=experts.dtype(leaves[0]),
        read=lambda start, stop: last(name, compute)[start:stop],
    )
