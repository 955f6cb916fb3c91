"""Q-MoE: a Q-Former whose top layers hold task experts, and a search for each sample's path through them.

N samples   P, K paths of a sample before and after a layer   E experts   Q queries   S words   D width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipPreTrainedModel,
    InstructBlipQFormerEmbeddings,
    InstructBlipQFormerEncoder,
    InstructBlipQFormerLayer,
    InstructBlipQFormerModel,
)
from transformers.utils import can_return_tuple

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.expert_path import beam_widths, trace_back
from moe_lvlm.connectors.task_experts import TaskExpertsLayer, TaskExpertsOutput
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import CONNECTOR, RoutingDecision, Site


class QMoEEncoder(InstructBlipQFormerEncoder):
    """The layers: below, stock ones; the top `settings.num_layers`, task experts."""

    def __init__(self, config: InstructBlipQFormerConfig, settings: ExpertSettings) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.num_dense = config.num_hidden_layers - settings.num_layers
        self.layer = nn.ModuleList(
            InstructBlipQFormerLayer(config, index)
            if index < self.num_dense
            else TaskExpertsLayer(config, index, settings)
            for index in range(config.num_hidden_layers)
        )
        self.widths = beam_widths(
            settings.num_layers, settings.num_experts, num_paths=settings.num_paths, selection=settings.selection
        )
        self.gradient_checkpointing = False

    @can_return_tuple
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        *,
        draw_ids: Tensor | None = None,
        is_counted: Tensor | None = None,
        trace: RoutingTrace | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """[N, Q + S, D] -> [N, Q + S, D] of the final path. As the stock encoder, and `QMoEModel.forward`."""
        num_samples = hidden_states.shape[0]
        shared = {"encoder_attention_mask": encoder_attention_mask, "query_length": query_length, **kwargs}
        layers = list(self.layer)
        for layer in layers[: self.num_dense]:
            hidden_states = layer(hidden_states, attention_mask, encoder_hidden_states, **shared)
        score_NP = hidden_states.new_zeros((num_samples, 1), dtype=torch.float64)
        outputs: list[TaskExpertsOutput] = []
        for layer, width in zip(layers[self.num_dense :], self.widths, strict=True):
            output = layer(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                score_NP=score_NP,
                num_kept=width,
                draw_ids=draw_ids,
                **shared,
            )
            hidden_states, score_NP = output.hidden_states, output.score_NK
            outputs.append(output)
        if trace is not None:
            if is_counted is None:
                is_counted = torch.ones(num_samples, dtype=torch.bool, device=hidden_states.device)
            for index, decision in enumerate(final_decisions(outputs, is_counted), start=self.num_dense):
                trace.record(Site(CONNECTOR, index), decision)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


class QMoEModel(InstructBlipQFormerModel):
    """A Q-Former with task experts (Q-MoE section 3).

    sum_over_ranks: the identity on one process; parallel/ hands in a differentiable sum over the data-parallel ranks,
    which `importance_loss` takes.

    Raises:
        ValueError: more layers with experts than the Q-Former has layers.
    """

    # Its block masks cannot be stretched over paths.
    _supports_flex_attn = False
    _no_split_modules: ClassVar[list[str]] = [*InstructBlipQFormerModel._no_split_modules, "TaskExpertsLayer"]

    def __init__(self, config: InstructBlipQFormerConfig, settings: ExpertSettings) -> None:
        if settings.num_layers > config.num_hidden_layers:
            raise ValueError(
                f"connector.experts.num_layers: {settings.num_layers} layers with experts in a Q-Former of "
                f"{config.num_hidden_layers}; allowed: 1 to {config.num_hidden_layers}"
            )
        InstructBlipPreTrainedModel.__init__(self, config)
        self.settings = settings
        self.embeddings = InstructBlipQFormerEmbeddings(config)
        self.encoder = QMoEEncoder(config, settings)
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _identity
        # Routers are bare parameters, which transformers leaves as they have drawn themselves.
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        draw_ids: Tensor | None = None,
        is_counted: Tensor | None = None,
        trace: RoutingTrace | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock Q-Former: what it gives back is that of the final path.

        input_ids: [N, S], [CLS] first, padded on the right. attention_mask: [N, Q + S]. query_embeds: [N, Q, D].
        encoder_hidden_states: [N, I, image width]. draw_ids: int64 [N], a number of the draw that brought each sample;
        noise in training is drawn from it, evaluation does not read it. is_counted: bool [N], False for rows that are
        no real images: their decisions keep nothing and have no part in the importance loss. trace: one decision a
        layer with experts, at `Site("connector", layer)`, level "image", is recorded in it, with gradients.

        Hidden states and attentions, where asked for, have a row for each path where a layer has several.

        Raises:
            ValueError: no text, queries or image; draw_ids or is_counted of another type or number; training with noise
                and without draw_ids.
        """
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError("Q-MoE routes by text: input_ids [N, S] with at least one word a sample are needed")
        for name, value in {"query_embeds": query_embeds, "encoder_hidden_states": encoder_hidden_states}.items():
            if value is None:
                raise ValueError(f"{name}: None; Q-MoE needs queries [N, Q, D] and image features [N, I, image width]")
        _check_rows("draw_ids", draw_ids, torch.int64, input_ids.shape[0])
        _check_rows("is_counted", is_counted, torch.bool, input_ids.shape[0])
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            query_embeds=query_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            draw_ids=draw_ids,
            is_counted=is_counted,
            trace=trace,
            **kwargs,
        )


def final_decisions(outputs: Sequence[TaskExpertsOutput], is_counted_N: Tensor) -> list[RoutingDecision]:
    """What was decided on each sample's final path, a decision a layer, bottom layer first."""
    decisions = []
    keep_N1 = is_counted_N[:, None]
    row_N = torch.arange(keep_N1.shape[0], device=keep_N1.device)
    for output, step in zip(outputs, trace_back([output.selection for output in outputs]), strict=True):
        weight_N1 = output.weight_NK[row_N, step.kept_N][:, None]
        decisions.append(
            RoutingDecision(
                logits_RE=output.logits_NPE[row_N, step.path_N],
                probs_RE=output.probs_NPE[row_N, step.path_N],
                expert_ids_RK=step.expert_N[:, None],
                weights_RK=torch.where(keep_N1, weight_N1, 0.0),
                keep_RK=keep_N1,
                level="image",
            )
        )
    return decisions


def _check_rows(name: str, value: Tensor | None, dtype: torch.dtype, num_samples: int) -> None:
    if value is not None and (value.dtype != dtype or value.shape != (num_samples,)):
        raise ValueError(
            f"{name}: {value.dtype} of shape {tuple(value.shape)}; allowed: {dtype} of shape ({num_samples},)"
        )


def _identity(x: Tensor) -> Tensor:
    return x
