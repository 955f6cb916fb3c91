"""A model's parts, run once forward and backward on fake tensors, and what that cost region by region.

Nothing is allocated: parameters may be real, fake or meta tensors, and the model itself is left as it is.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig

from moe_lvlm.adapters.linear import LoRAExpertLinear
from moe_lvlm.estimation.parts import (
    UNMASKED,
    VLM,
    Part,
    answer_length,
    connector_part,
    head_part,
    language_part,
    tower_part,
)
from moe_lvlm.estimation.recorder import SHARED, Cost, Counting, Recorder, Region
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.estimation.stand_ins import (
    BlindClusterRouter,
    BlindInstructRouter,
    StandInExperts,
    StandInLoRAExperts,
    StandInMoELayer,
    twin,
)
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.cluster import ClusterRouter
from moe_lvlm.routing.instruct import InstructRouter
from moe_lvlm.routing.ltdr import LongTailRouter
from moe_lvlm.routing.router import Router

ATTENTION, DENSE_FFN, EXPERTS, SHARED_EXPERTS, ROUTER, OTHER = (
    "attention",
    "dense_ffn",
    "experts",
    "shared_experts",
    "router",
    "other",
)
_LAYER = re.compile(r"[^\d]*\b(?:layers|layer|block)\.(\d+)")
_FFNS = frozenset({"mlp", "fc1", "fc2", "DenseReluDense", "intermediate", "output", "experts", "general"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """costs: by region. layer_inputs: bytes that a checkpointed layer keeps, by part and layer. working: the most bytes
    that a part needs for a moment besides what is saved. has_gradient: parts that gradients pass.
    tower_positions, visual_tokens: of all images. head_positions: for which logits are made."""

    costs: dict[Region, Cost]
    layer_inputs: dict[tuple[str, int], int]
    working: dict[str, int]
    has_gradient: frozenset[str]
    tower_positions: int
    visual_tokens: int
    head_positions: int


def probe(
    model: VLM,
    shape: BatchShape,
    *,
    dtype: torch.dtype,
    expert_parallel_size: int = 1,
    runs_tower: bool = True,
) -> Probe:
    """A micro-batch's forward and backward pass; what is trained is what `requires_grad` says.

    dtype: of parameters and activations. runs_tower: False where its features come from a cache.

    Raises:
        ValueError: adapters on experts.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _Probing(model, shape, dtype, expert_parallel_size, runs_tower=runs_tower).run()


class _Probing:
    """The parts one after the other, each told whether its input needs a gradient."""

    def __init__(
        self, model: VLM, shape: BatchShape, dtype: torch.dtype, expert_parallel_size: int, *, runs_tower: bool
    ) -> None:
        self.model, self.shape, self.dtype = model, shape, dtype
        self.expert_parallel_size, self.runs_tower = expert_parallel_size, runs_tower
        self.costs: dict[Region, Cost] = {}
        self.layer_inputs: dict[tuple[str, int], int] = {}
        self.working: dict[str, int] = {}
        self.has_gradient: set[str] = set()
        self._fakes: dict[int, Tensor] = {}

    def run(self) -> Probe:
        model, shape, dtype = self.model, self.shape, self.dtype
        needs_grad = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
        tower_positions = visual_tokens = 0
        if shape.num_images:
            features = self._record(tower_part(model, shape, dtype))
            tokens = self._record(connector_part(model, features, needs_grad=features.requires_grad))
            needs_grad = needs_grad or tokens.requires_grad
            tower_positions, visual_tokens = features.shape[:2].numel(), tokens.shape[:2].numel()
        hidden = self._record(language_part(model, shape, dtype, needs_grad=needs_grad))
        positions = self._head_positions()
        self._record(head_part(model, positions, dtype, needs_grad=hidden.requires_grad))
        return Probe(
            costs=self.costs,
            layer_inputs=self.layer_inputs,
            working=self.working,
            has_gradient=frozenset(self.has_gradient),
            tower_positions=tower_positions,
            visual_tokens=visual_tokens,
            head_positions=positions,
        )

    def _head_positions(self) -> int:
        """LLaVA makes logits where there is a loss, a decoder-only InstructBLIP in the columns where a row has one (at most
        in all), an encoder-decoder at all of its answers."""
        shape = self.shape
        if self.model.config.is_answer_apart:
            return len(shape.sample_lengths) * answer_length(shape)
        rows = 1 if isinstance(self.model, MoELlavaForConditionalGeneration) else shape.rows
        return min(max(shape.supervised, 1) * rows, shape.positions)

    def _record(self, part: Part) -> Tensor:
        """Run a part forward and, if gradients pass it, backward; its output."""
        made = twin(part.module, self._give, partial(self._replace, part))
        ignored = {tensor.untyped_storage()._cdata for tensor in self._fakes.values()}
        recorder = Recorder(Region(part.name, SHARED, OTHER), part.sequence, frozenset(ignored))
        self._watch(made, recorder)
        with saved_tensors_hooks(recorder.pack, recorder.unpack), Counting(recorder):
            output = part.run(made)
        if output.requires_grad:
            self.has_gradient.add(part.name)
            recorder.is_backward = True
            with Counting(recorder):
                output.backward(torch.empty_like(output))
        if part.name != "tower" or self.runs_tower:
            self.costs |= recorder.costs
            self.working[part.name] = recorder.working
        return output

    def _give(self, tensor: Tensor) -> Tensor:
        """The fake in the place of a parameter or buffer, the same for tied ones."""
        if id(tensor) not in self._fakes:
            dtype = self.dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=dtype, requires_grad=tensor.requires_grad)
            if fake.requires_grad:
                # As under ZeRO, which takes each gradient away when it is there
                fake.register_post_accumulate_grad_hook(_drop_gradient)
            self._fakes[id(tensor)] = fake
        return self._fakes[id(tensor)]

    def _replace(self, part: Part, made: nn.Module) -> nn.Module:
        if part.is_unmasked and isinstance(getattr(made, "config", None), PreTrainedConfig):
            made.config = _with_attention(made.config, UNMASKED)
        if isinstance(made, MoELayer):
            return StandInMoELayer(
                made,
                tokens=self.shape.tokens,
                tail_share=self.shape.tail_share,
                expert_parallel_size=self.expert_parallel_size,
            )
        if isinstance(made, LongTailRouter) and made.needs_attention:
            # It counts what attention says of values; tokens that are chosen otherwise cost the same
            made.settings = made.settings.model_copy(update={"eea_select": "vision_tail"})
        if isinstance(made, ClusterRouter):
            return BlindClusterRouter(made)
        if isinstance(made, InstructRouter):
            return BlindInstructRouter(made)
        if isinstance(made, LoRAExpertLinear):
            return StandInLoRAExperts(made, by_token=self.shape.padded_to is None)
        return made

    def _watch(self, made: nn.Module, recorder: Recorder) -> None:
        """Let modules tell the recorder where the pass is."""
        part = recorder.region.part
        for name, module in made.named_modules():
            found = _LAYER.match(name)
            layer = int(found[1]) if found else SHARED
            if found and found[0] == name:
                watch: _Watch = _LayerWatch(recorder, Region(part, layer, OTHER), self.layer_inputs)
                module.register_forward_pre_hook(watch.enter, with_kwargs=True)
                module.register_forward_hook(watch.leave)
            elif (kind := _kind(name, module)) is not None:
                watch = _Watch(recorder, Region(part, layer, kind))
                module.register_forward_pre_hook(watch.enter, with_kwargs=True)
                module.register_forward_hook(watch.leave)


def _with_attention(config: Any, name: str) -> PreTrainedConfig:
    changed: PreTrainedConfig = copy.copy(config)
    changed._attn_implementation = name
    return changed


def _kind(name: str, module: nn.Module) -> str | None:
    leaf = name.rpartition(".")[2]
    if isinstance(module, StandInMoELayer):
        return None
    if isinstance(module, StandInExperts):
        return EXPERTS
    if isinstance(module, Router):
        return ROUTER
    if ".shared_experts." in name:
        return SHARED_EXPERTS
    if "attn" in leaf.lower() or "attention" in leaf.lower():
        return ATTENTION
    return DENSE_FFN if leaf in _FFNS else None


class _Watch:
    """A module's hooks: the recorder is in its region while it runs."""

    def __init__(self, recorder: Recorder, region: Region) -> None:
        self.recorder, self.region = recorder, region
        self.outer: list[Region] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.outer.append(self.recorder.region)
        self.recorder.region = self.region

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.recorder.region = self.outer.pop()


class _LayerWatch(_Watch):
    """The same for a layer, which may be checkpointed: it then keeps its input, and what all layers are given."""

    def __init__(self, recorder: Recorder, region: Region, layer_inputs: dict[tuple[str, int], int]) -> None:
        super().__init__(recorder, region)
        self.layer_inputs = layer_inputs

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *others = args
        key = (self.region.part, self.region.layer)
        self.layer_inputs[key] = self.layer_inputs.get(key, 0) + hidden.untyped_storage().nbytes()
        self.recorder.share((others, list(kwargs.values())))
        super().enter(module, args, kwargs)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
