"""A Q-Former layer whose query FFN is a Task Experts Block (Q-MoE section 3.2).

N samples   P paths of a sample before the layer   K paths kept after it   R rows (N x P, a sample's paths side by side)
E experts   Q queries   S words   L positions (Q + S)   D width   I image positions
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipQFormerIntermediate,
    InstructBlipQFormerLayer,
    InstructBlipQFormerOutput,
)

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.expert_path import Selection, select_paths
from moe_lvlm.connectors.routers import ROUTERS
from moe_lvlm.moe.checkpointing import refuse_reentrant
from moe_lvlm.routing.noise import sample_noise


class TaskExpertsOutput(NamedTuple):
    """What a layer hands on. A flat tuple, since ZeRO-3's hooks look into nothing else; hidden states come first, where
    transformers' recorder of hidden states takes them.

    hidden_states: [N x K, Q + S, D], of the paths kept, each sample's best first.
    logits_NPE, probs_NPE: scores without noise and their softmax, on each path that came in.
    path_NK, expert_NK, score_NK: as in `Selection`.
    weight_NK: what the expert's output was multiplied by.
    """

    hidden_states: Tensor
    logits_NPE: Tensor
    probs_NPE: Tensor
    path_NK: Tensor
    expert_NK: Tensor
    score_NK: Tensor
    weight_NK: Tensor

    @property
    def selection(self) -> Selection:
        return Selection(self.path_NK, self.expert_NK, self.score_NK)


class QueryFFN(nn.Module):
    """f(x) = LN(x + W2 gelu(W1 x)) (Q-MoE eq. 1), under the names that a dense layer's query FFN has."""

    def __init__(self, config: InstructBlipQFormerConfig) -> None:
        super().__init__()
        self.intermediate_query = InstructBlipQFormerIntermediate(config)
        self.output_query = InstructBlipQFormerOutput(config)

    def forward(self, x_RQD: Tensor) -> Tensor:
        return self.output_query(self.intermediate_query(x_RQD), x_RQD)


class TaskExpertsLayer(InstructBlipQFormerLayer):
    """Self-attention of queries and words, cross-attention into the image, a text FFN, and experts for the queries.

    Every expert is computed on every path: CROSS and POST route by what the experts make of x, and ranks must call the
    same modules in the same order whatever is chosen. What is not chosen gets a gradient of 0, not none.

    general: the General FFN, or None.
    """

    def __init__(self, config: InstructBlipQFormerConfig, layer_idx: int, settings: ExpertSettings) -> None:
        super().__init__(config, layer_idx)
        del self.intermediate_query, self.output_query
        self.settings = settings
        self.experts = nn.ModuleList(QueryFFN(config) for _ in range(settings.num_experts))
        self.general = QueryFFN(config) if settings.has_general_expert else None
        self.router = ROUTERS[settings.router](config.hidden_size, settings.num_experts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            refuse_reentrant(self._gradient_checkpointing_func)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        *,
        score_NP: Tensor,
        num_kept: int,
        draw_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TaskExpertsOutput:
        """One layer on all paths.

        hidden_states: [R, Q + S, D]. attention_mask, encoder_hidden_states [N, I, image width], encoder_attention_mask:
        as a dense layer gets them, one a sample and not one a path. query_length: Q. score_NP: of the paths so far.
        num_kept: K. draw_ids: int64 [N], what the noise of training is drawn from. kwargs: the attention's.

        Raises:
            ValueError: training with noise and without draw ids.
        """
        num_samples, num_paths = score_NP.shape
        if attention_mask is not None and num_paths > 1:
            attention_mask = attention_mask.repeat_interleave(num_paths, dim=0)
        attended = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x_RQD = attended[:, :query_length]
        if self.has_cross_attention:
            x_RQD = self._look_at_image(x_RQD, encoder_hidden_states, encoder_attention_mask, num_paths, **kwargs)
        text_RSD = self.feed_forward_chunk(attended[:, query_length:])
        expert_out_REQD = torch.stack([expert(x_RQD) for expert in self.experts], dim=1)
        general_RQD = None if self.general is None else self.general(x_RQD)

        logits_NPE = self.router(x_RQD, expert_out_REQD, text_RSD[:, 0]).unflatten(0, (num_samples, num_paths))
        log_gate_NPE = self._add_noise(logits_NPE, draw_ids).log_softmax(dim=-1)
        selection = select_paths(score_NP, log_gate_NPE, num_kept=num_kept)

        path_NK, expert_NK, _ = selection
        sample_N1 = torch.arange(num_samples, device=path_NK.device)[:, None]
        gate_NK = log_gate_NPE[sample_N1, path_NK, expert_NK].exp()
        chosen_NKQD = expert_out_REQD.unflatten(0, (num_samples, num_paths))[sample_N1, path_NK, expert_NK]
        row_NK = sample_N1 * num_paths + path_NK
        query_NKQD, weight_NK = self._combine(
            gate_NK, chosen_NKQD, None if general_RQD is None else general_RQD[row_NK]
        )
        # The words go on with their path: joint attention makes them differ from path to path.
        hidden_NKLD = torch.cat([query_NKQD, text_RSD[row_NK]], dim=2)
        return TaskExpertsOutput(
            hidden_NKLD.flatten(0, 1), logits_NPE, logits_NPE.softmax(dim=-1), *selection, weight_NK=weight_NK
        )

    def _look_at_image(
        self, x_RQD: Tensor, image_NID: Tensor | None, mask: Tensor | None, num_paths: int, **kwargs: Any
    ) -> Tensor:
        """Cross-attention with a sample's paths side by side on the query axis: the image's keys and values are made
        once a sample, not once a path."""
        # Of masks [N, 1, Q, I]; those without a row a query hold for all.
        if mask is not None and mask.dim() == 4 and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, num_paths, 1)
        num_samples = x_RQD.shape[0] // num_paths
        folded = x_RQD.reshape(num_samples, -1, x_RQD.shape[-1])
        seen = self.crossattention(folded, encoder_hidden_states=image_NID, encoder_attention_mask=mask, **kwargs)
        return seen.view_as(x_RQD)

    def _add_noise(self, logits_NPE: Tensor, draw_ids: Tensor | None) -> Tensor:
        """The scores by which training chooses; all paths of a sample get the same noise. Outside training no noise."""
        num_experts, std = self.settings.num_experts, self.settings.noise_std
        if not self.training or num_experts == 1 or std == 0:
            return logits_NPE
        if draw_ids is None:
            raise ValueError(
                f"connector.experts.noise: {std:.4g} in training needs draw_ids [N], a number for each sample's draw; "
                "allowed: draw_ids, or noise: 0"
            )
        noise_NE = sample_noise(draw_ids, layer=self.layer_idx, num_experts=num_experts, std=std)
        return logits_NPE + noise_NE[:, None].to(logits_NPE.dtype)

    def _combine(self, gate_NK: Tensor, chosen_NKQD: Tensor, general_NKQD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, weight of the chosen expert in it): general f(x) + g_i f_i(x) (Q-MoE eq. 4 to 6).

        `normalize_output` (ours) divides by the sum of the gates used: 1 + g, or g. g / g would leave the router
        without a gradient, hence g / stop_gradient(g).
        """
        weight_NK, general_weight_NK = gate_NK, torch.ones_like(gate_NK)
        if self.settings.normalize_output:
            total_NK = gate_NK.detach() if general_NKQD is None else 1 + gate_NK
            weight_NK, general_weight_NK = gate_NK / total_NK, general_weight_NK / total_NK
        out_NKQD = weight_NK[..., None, None] * chosen_NKQD
        if general_NKQD is not None:
            out_NKQD = general_weight_NK[..., None, None] * general_NKQD + out_NKQD
        # Summed in the scores' type
        return out_NKQD.to(chosen_NKQD.dtype), weight_NK
