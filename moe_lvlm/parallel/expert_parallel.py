"""Expert parallelism on DeepSpeed: the one file that knows its expert-parallel contract.

DeepSpeed's AutoEP layers work with ZeRO 0-3, but only for a few text models and a fixed top-k. Ours keep their own
forward and fulfil what the engine asks of such a layer: its class, its process groups, and the marks on its
parameters. The contract is private, so DeepSpeed is pinned to one version and any other raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from moe_lvlm.config.deepspeed import DEEPSPEED_VERSION
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.moe.dispatch import AllToAllDispatcher
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.types import ExpertSlice
from moe_lvlm.moe.upcycle import moe_layers


class SharedOutMoELayer(MoELayer):
    """A MoELayer that holds its share of the experts and exchanges rows over an expert-parallel group.

    Its own class at ZeRO 1 and 2 where no expert is trained: DeepSpeed would look for the experts' optimizer groups in
    vain. ZeRO 3 does not, and partitions experts rightly under the class below only.
    """

    def __init__(self, layer: MoELayer, *, group_name: str) -> None:
        group = groups._get_expert_parallel_group(group_name)
        MoELayer.__init__(
            self,
            router=layer.router,
            experts=layer.experts,
            site=layer.site,
            shared_experts=layer.shared_experts,
            dispatcher=AllToAllDispatcher(group),
            adapters=layer.adapters,
        )
        # What DeepSpeed's engine reads of an expert-parallel layer
        self.ep_group_name = group_name
        self.ep_group = group
        self.ep_size = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        self.num_experts = layer.router.num_experts
        self.num_local_experts = self.num_experts // self.ep_size
        self.folding_group_handles = None
        self.combine_impl, self.comm_backend = "weighted_sum", "comm"
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        self.train(layer.training)
        self._take_share()
        self._mark_parameters()

    def _take_share(self) -> None:
        """Keep this rank's experts only; meta tensors stay meta tensors."""
        start = self.ep_rank * self.num_local_experts
        held = ExpertSlice(start, start + self.num_local_experts, self.num_experts)
        for module in self.held_by_expert():
            for name, stack in list(module.named_parameters(recurse=False)):
                share = nn.Parameter(stack.detach()[held.start : held.stop].clone(), requires_grad=stack.requires_grad)
                _mark(share, expert_slice=held)
                module._parameters[name] = share
        self.experts.num_experts = self.num_local_experts

    def _mark_parameters(self) -> None:
        for parameter in self.parameters():
            _mark(parameter, allreduce=True, ds_zero_placement_family="replicated")
        for parameter in _expert_parameters(self):
            _mark(
                parameter,
                allreduce=False,
                group_name=self.ep_group_name,
                is_expert_group=True,
                ds_zero_placement_family="autoep_expert",
                ds_zero_partition_group_name=self.ep_group_name,
                **{DS_AUTOEP_UC_META: self._universal_metadata(parameter)},
            )

    def _universal_metadata(self, parameter: Tensor) -> dict[str, Any]:
        """Where the rows of an expert parameter belong, in the words of DeepSpeed's universal checkpoints."""
        logical_shape = [self.num_experts, *parameter.shape[1:]]
        descriptor = self.expert_placement_descriptor
        return {
            AUTOEP_EXPERT_PLACEMENT: descriptor,
            AFFINE_MAP: autoep_placement_to_affine_map(descriptor, logical_shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(descriptor, self.ep_rank)),
        }


class ExpertParallelMoELayer(SharedOutMoELayer, AutoEPMoELayer):
    """The same with experts that are trained. An AutoEPMoELayer in class only, which is what DeepSpeed's engine looks
    for: that constructor is not called and that forward not used."""


def bind_expert_parallel(model: nn.Module, expert_parallel_size: int, *, zero_stage: int) -> None:
    """Spread the experts of a built model (on meta tensors or not) over groups of `expert_parallel_size` ranks.

    The child that is a MoELayer is replaced by its expert-parallel form, before DeepSpeed sees the model and before
    an optimizer exists; what is trained (`requires_grad`) must be decided. Size 1 changes nothing: experts are then
    ordinary replicated parameters. Global statistics of routers, and the importance of a connector's experts, are
    summed over all ranks in either case.

    zero_stage: of the engine to come.

    Raises:
        ValueError: a size that does not divide the experts or the world.
        RuntimeError: another DeepSpeed than the one whose contract this is.
    """
    check_deepspeed_version()
    world = dist.get_world_size()
    if world % expert_parallel_size:
        raise ValueError(
            f"parallel.expert_parallel_size: {expert_parallel_size} does not divide the number of processes ({world})"
        )
    layers = moe_layers(model)
    for name, layer in layers:
        if layer.router.num_experts % expert_parallel_size:
            raise ValueError(
                f"parallel.expert_parallel_size: {expert_parallel_size} does not divide the "
                f"{layer.router.num_experts} experts of {name}"
            )
        layer.router.sum_over_ranks = _sum_over_world
    for module in model.modules():
        if isinstance(module, QMoEModel):
            module.sum_over_ranks = sum_with_gradient
    if expert_parallel_size == 1:
        return
    group_name = f"ep_size_{expert_parallel_size}"
    if group_name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size)
    is_trained = any(p.requires_grad for _, layer in layers for p in _expert_parameters(layer))
    layer_class = ExpertParallelMoELayer if is_trained or zero_stage >= 3 else SharedOutMoELayer
    for name, layer in layers:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer_class(layer, group_name=group_name))


def check_deepspeed_version() -> None:
    """RuntimeError unless the installed DeepSpeed is the one whose private contract this file fulfils."""
    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} is installed; expert parallelism is written against the private "
            f"contract of {DEEPSPEED_VERSION}: install that version"
        )


def _expert_parameters(layer: MoELayer) -> Iterator[nn.Parameter]:
    """What is spread over the ranks: the experts' parameters, and those of adapters on them."""
    for module in layer.held_by_expert():
        yield from module.parameters(recurse=False)


def _mark(parameter: nn.Parameter, **marks: Any) -> None:
    """Set attributes on a parameter, where DeepSpeed and our checkpoints look for them."""
    for name, value in marks.items():
        setattr(parameter, name, value)


def _sum_over_world(x: Tensor) -> Tensor:
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.distributed.get_world_size()


def sum_with_gradient(x: Tensor) -> Tensor:
    """The sum over all ranks, differentiable, for a loss that every rank computes from it alike.

    The gradient of all ranks' losses together is then the world size times that of one, and no exchange is needed for
    it; the mean over ranks that data parallelism takes gives back the gradient of the one loss.
    """
    total: Tensor = _SumWithGradient.apply(x)
    return total
