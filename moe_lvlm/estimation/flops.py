"""Floating-point operations of a training step, needed ones apart from those that are done besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import InstructBlipQFormerModel

from moe_lvlm.estimation.parts import CONNECTOR, HEAD, TOWER, VLM, check_model
from moe_lvlm.estimation.probe import EXPERTS, Probe, probe
from moe_lvlm.estimation.recorder import Region, Work
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.estimation.stand_ins import routed_rows
from moe_lvlm.moe.checkpointing import choose_layers
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.types import LANGUAGE_MODEL

__all__ = ["BatchShape", "StepFlops", "checkpointed_layers", "step_flops"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Of one micro-batch on one process; a multiply and an add count as 2. Matrix products only: norms, activations and
    the like are no work for a peak that is measured in products.

    forward: needed forward, towers and connector included: no padding, half of causal attention's pairs, logits where
        there is a loss.
    backward: needed backward: input gradients only where something trained lies below, weight gradients of trained parts
        only.
    recompute: forward again of checkpointed layers.
    padding: forward and backward that is done and not needed: at padding, and pairs of positions that a mask hides.
    six_n: 6 x activated parameters x tokens, the usual convention: the language model without its embeddings, and with
        its head, at all tokens; the connector at visual tokens; the tower at its own.
    """

    forward: float
    backward: float
    recompute: float
    padding: float
    six_n: float

    @property
    def needed(self) -> float:
        return self.forward + self.backward


def step_flops(
    model: nn.Module,
    shape: BatchShape,
    *,
    checkpointed: bool | int = False,
    runs_tower: bool = True,
) -> StepFlops:
    """What a micro-batch needs. model: on any device, meta too; whole, or one process's share of the experts. What is
    trained is what `requires_grad` says.

    checkpointed: `train.gradient_checkpointing`. runs_tower: False where features come from a cache.

    Raises:
        ValueError: another model than ours, or more checkpointed layers than it has.
    """
    known = check_model(model)
    probed = probe(known, shape, dtype=torch.bfloat16, runs_tower=runs_tower)
    return count_flops(known, shape, probed, checkpointed=checkpointed)


def count_flops(model: VLM, shape: BatchShape, probed: Probe, *, checkpointed: bool | int = False) -> StepFlops:
    """The same of a micro-batch that has been probed."""
    repeated = checkpointed_layers(model, checkpointed)
    forward = backward = recompute = done = 0.0
    for region, cost in probed.costs.items():
        share = needed_share(model, shape, probed, region)
        forward += (part := share.of(cost.forward))
        backward += share.of(cost.backward)
        is_repeated = (region.part, region.layer) in repeated and region.part in probed.has_gradient
        recompute += part if is_repeated else 0.0
        work = cost.forward + cost.backward
        done += work.products + work.pairs * done_pairs(shape, region)
    return StepFlops(
        forward=forward,
        backward=backward,
        recompute=recompute,
        padding=done - forward - backward,
        six_n=_six_n(model, shape, probed),
    )


class Share(NamedTuple):
    """Of what was probed. products: of those that grow with tokens. pairs: of attention's."""

    products: float
    pairs: float

    def of(self, work: Work) -> float:
        return work.products * self.products + work.pairs * self.pairs


def needed_share(model: VLM, shape: BatchShape, probed: Probe, region: Region) -> Share:
    """Which share of a region's work is needed."""
    if region.part == HEAD:
        return Share(shape.supervised / probed.head_positions, 0.0)
    if region.part != LANGUAGE_MODEL:
        return Share(1.0, 1.0)
    # Rows of experts are no padding
    products = 1.0 if region.kind == EXPERTS else shape.tokens / shape.positions
    is_causal = not model.config.is_answer_apart
    return Share(products, shape.squares / (shape.rows * shape.width**2) / (2 if is_causal else 1))


def done_pairs(shape: BatchShape, region: Region) -> float:
    """Which share of all pairs attention looks at: those under a mask too, but in packed rows none between samples and
    none that look ahead."""
    if region.part != LANGUAGE_MODEL or shape.padded_to is not None:
        return 1.0
    return shape.squares / shape.width**2 / 2


def checkpointed_layers(model: VLM, checkpointed: bool | int) -> frozenset[tuple[str, int]]:
    """Part and index of each layer whose forward pass is repeated, as the trainer chooses them.

    checkpointed: `train.gradient_checkpointing`.

    Raises:
        ValueError: more than there are.
    """
    if checkpointed is False:
        return frozenset()
    layers = model.language_layers()
    if checkpointed is not True:
        return frozenset((LANGUAGE_MODEL, index) for index in choose_layers(layers, checkpointed))
    connector = {(CONNECTOR, index) for index in range(len(_qformer_layers(model)))}
    return frozenset({(LANGUAGE_MODEL, index) for index in range(len(layers))} | connector)


def _qformer_layers(model: VLM) -> list[nn.Module]:
    qformer = next((module for module in model.modules() if isinstance(module, InstructBlipQFormerModel)), None)
    return [] if qformer is None else list(qformer.encoder.layer)


def _six_n(model: VLM, shape: BatchShape, probed: Probe) -> float:
    counts = activated_parameters(model, shape)
    total = counts[LANGUAGE_MODEL] * shape.tokens + counts[CONNECTOR] * probed.visual_tokens
    has_tower = any(region.part == TOWER for region in probed.costs)
    return 6 * (total + (counts[TOWER] * probed.tower_positions if has_tower else 0))


def activated_parameters(model: VLM, shape: BatchShape) -> dict[str, float]:
    """Parameters that a token passes, on average, by part; the language model's with its head and without embeddings."""
    factor: dict[int, float] = {}
    for _, layer in moe_layers(model):
        held = layer.experts.w1.shape[0]
        rows = routed_rows(layer.router, tokens=shape.tokens, tail_share=shape.tail_share)
        factor |= {id(parameter): rows / shape.tokens / held for parameter in layer.experts.parameters()}
    head = model.get_output_embeddings().weight
    factor[id(model.get_input_embeddings().weight)] = 0.0
    factor[id(head)] = 1.0  # also where it is the embeddings
    counts = {TOWER: 0.0, CONNECTOR: 0.0, LANGUAGE_MODEL: 0.0}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel() * factor.get(id(parameter), 1.0)
    return counts


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if name.startswith(("model.vision_tower.", "vision_model.")):
        return TOWER
    if name.startswith(("model.language_model.", "language_model.", "lm_head.")):
        return LANGUAGE_MODEL
    return CONNECTOR
