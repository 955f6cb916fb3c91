"""Linear layers with a LoRA, or with LoRA experts behind a gate, beside their weight.

B batch   S sequence   N samples   T tokens   K experts chosen   J experts used, the universal one too
I inputs, O outputs of a linear   G width of what a gate reads
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.facts import BatchFacts
from moe_lvlm.adapters.gates import build_gate, choose_experts, draw_noise, expert_weights
from moe_lvlm.adapters.low_rank import add_lora, add_sample_experts, add_token_experts
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.routing.gates import Gate
from moe_lvlm.routing.noise import spread_draws
from moe_lvlm.routing.types import RoutingDecision, Site


class AdaptedLinear(nn.Module):
    """What a linear layer with low-rank matrices beside its weight, and a stack of them (experts'), have in common.

    lora_A: [..., E', rank, I]; lora_B: [..., E', O, rank].
    site: where decisions go in the trace. facts: of the batch, while the decoder layer runs; else None.
    """

    settings: LoRASettings
    site: Site
    facts: BatchFacts | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draw A anew as PEFT does (Kaiming's uniform, a = sqrt(5)), each expert by itself, and let B be 0."""
        for a_rI in self.lora_A:
            draw_a(a_rI)
        nn.init.zeros_(self.lora_B)

    def _drop(self, x: Tensor) -> Tensor:
        """What A reads, as PEFT has it: x after dropout, in A's type."""
        dropped = nn.functional.dropout(x, self.settings.dropout, self.training)
        return dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(self.lora_A.dtype)


class GatedAdapter(AdaptedLinear):
    """LoRA experts behind a gate.

    gate: W_gate of MoCLE eq. 1, [E, G]. table: a table of its own, [rows, G] (compat `released` only).
    """

    settings: MoCLESettings
    gate: Gate
    table: nn.Embedding | None

    def _add_gate(self, num_inputs: int, weight: Tensor) -> None:
        """Make the gate and the table. num_inputs: width of the hidden states that the gate may read. weight: what is
        adapted, whose type and device they get."""
        settings = self.settings
        with weight.device:
            width = settings.embedding_width if settings.reads_table else num_inputs
            self.gate = build_gate(width, settings)
            self.table = nn.Embedding(settings.num_clusters, width) if settings.compat == "released" else None
        self.gate.to(weight.dtype)
        if self.table is not None:
            self.table.to(weight.dtype)

    def reset_adapter(self) -> None:
        """The gate too, as its kind has it, and a table of its own as `start.reset_table` does."""
        super().reset_adapter()
        self.gate.reset_parameters()
        if self.table is not None:
            reset_table(self.table)

    def scores(self, described_NG: Tensor, *, noise_NE: Tensor | None = None, keep_N1: Tensor) -> RoutingDecision:
        """The decision about rows that are described."""
        is_token = self.settings.gating == "token"
        return choose_experts(self.gate(described_NG), keep_N1, self.settings, noise_NE=noise_NE, is_token=is_token)

    def _decide_and_record(self, x: Tensor) -> tuple[RoutingDecision, BatchFacts]:
        """The decision about the batch that is told of, whose tokens x [..., I] are, and the facts that it was made by.

        Raises:
            ValueError: outside an adapted decoder layer, for other tokens than the context's, or without the facts that
                the gate reads.
        """
        facts = self.facts
        if facts is None:
            raise ValueError(
                f"{self.site.part} of layer {self.site.layer} was called outside its decoder layer, which tells it what "
                "the tokens are; allowed: attach(decoder, settings), and calls of the decoder"
            )
        batch, sequence = facts.context.sample_BS.shape
        if x.shape[:-1].numel() != batch * sequence:
            raise ValueError(
                f"{self.site.part} of layer {self.site.layer}: input of shape {tuple(x.shape)} for a routing context of "
                f"shape {(batch, sequence)}: they must describe the same tokens"
            )
        decision = self._decide(x.reshape(-1, x.shape[-1]), facts)
        if facts.trace is not None:
            facts.trace.record(self.site, decision)
        return decision, facts

    def _decide(self, x_TI: Tensor, facts: BatchFacts) -> RoutingDecision:
        # What was decided for a sample when its prompt was read holds for what follows.
        prompt = facts.context.prompt
        if prompt is not None and self.site in prompt:
            return prompt[self.site]
        described_NG = self._describe(x_TI, facts)
        if self.settings.gating == "token":
            keep_N1 = (facts.context.sample_T >= 0)[:, None]
        else:
            keep_N1 = torch.full((len(described_NG), 1), facts.num_samples > 0, device=x_TI.device)
        return self.scores(described_NG, noise_NE=self._noise(facts), keep_N1=keep_N1)

    def _describe(self, x_TI: Tensor, facts: BatchFacts) -> Tensor:
        """What the gate reads, one row a sample or token."""
        gating, num_rows = self.settings.gating, facts.num_rows
        if gating == "token":
            return x_TI
        if gating == "sentence":
            # At the input of this very linear, before dropout; in float32 as the mean of INSTRUCT is.
            with torch.autocast(x_TI.device.type, enabled=False):
                return facts.instruction_NT.to(torch.promote_types(x_TI.dtype, torch.float32)) @ _at_least_float32(x_TI)
        if self.table is not None:
            if not facts.num_samples:
                return self.table(torch.zeros(1, dtype=torch.int64, device=x_TI.device))
            if (cluster_N := facts.context.cluster_N) is None:
                raise ValueError(f"adapter gating {gating}: {unknown_rows(gating)}")
            return self.table(cluster_N[:num_rows])
        embedding_NG = facts.context.embedding_NG
        if embedding_NG is None:
            raise ValueError(
                f"adapter gating {gating}: the routing context holds no embeddings; allowed: "
                "adapters.look_up(decoder, context) before the forward pass"
            )
        return embedding_NG[:num_rows]

    def _noise(self, facts: BatchFacts) -> Tensor | None:
        settings = self.settings
        if not self.training or settings.noise_std == 0 or settings.num_experts == 1 or not facts.num_samples:
            return None
        draw_N = facts.context.draw_N
        if draw_N is None:
            raise ValueError(
                f"adapter.noise: {settings.noise_std:.4g} in training needs draw_N, a number for each sample's draw, in "
                "the routing context; allowed: draw_N, or noise: 0"
            )
        if settings.gating == "token":
            return draw_noise(spread_draws(draw_N[facts.sample_T], facts.place_T), self.site, settings)
        return draw_noise(draw_N[: facts.num_samples], self.site, settings)


class WrappedLinear(AdaptedLinear, nn.Linear):
    """A linear layer that keeps its name, its `weight` and its `bias`, with low-rank matrices beside them.

    lora_A: [E', rank, I]; lora_B: [E', O, rank], in the type and on the device of the weight.
    """

    def __init__(self, linear: nn.Linear, settings: LoRASettings, site: Site, *, num_pairs: int) -> None:
        nn.Module.__init__(self)
        # Hooks and flags stay with the place; the dictionaries are copied so that the old module keeps its own.
        for name, value in linear.__dict__.items():
            self.__dict__[name] = value.copy() if isinstance(value, dict) else value
        self.settings = settings
        self.site = site
        self.facts = None
        self.lora_A = nn.Parameter(linear.weight.new_empty(num_pairs, settings.rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_empty(num_pairs, linear.out_features, settings.rank))

    def _base(self, x_TI: Tensor) -> Tensor:
        """A tensor of its own, no view of one: what the adapter gives is added in place."""
        return nn.functional.linear(x_TI, self.weight, self.bias)


class LoRALinear(WrappedLinear):
    """W x + scale B A x."""

    def __init__(self, linear: nn.Linear, settings: LoRASettings, site: Site) -> None:
        super().__init__(linear, settings, site, num_pairs=1)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        x_TI = x.reshape(-1, self.in_features)
        out_TO = add_lora(self._base(x_TI), self._drop(x_TI), self.lora_A[0], self.lora_B[0], scale=self.settings.scale)
        return out_TO.view(*x.shape[:-1], self.out_features)


class LoRAExpertLinear(GatedAdapter, WrappedLinear):
    """W x + scale (G_max E_top(x) + (1 - G_max) U(x)) (MoCLE eq. 3), or without U the sum of G_i E_i(x) (eq. 2).

    Compat `released` multiplies the expert by G a second time, not the universal expert.
    """

    def __init__(self, linear: nn.Linear, settings: MoCLESettings, site: Site) -> None:
        super().__init__(linear, settings, site, num_pairs=settings.num_experts + settings.has_universal)
        self._add_gate(linear.in_features, linear.weight)
        self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; the leading dimensions are those of the routing context, or flattened.

        Raises:
            ValueError: outside an adapted decoder layer, for other tokens than the context's, or without the facts that
                the gate reads.
        """
        decision, facts = self._decide_and_record(x)
        x_TI = x.reshape(-1, self.in_features)
        add = self._add_by_token if decision.level == "token" or facts.is_packed else self._add_by_sample
        out_TO = add(self._base(x_TI), self._drop(x_TI), decision, facts)
        return out_TO.view(*x.shape[:-1], self.out_features)

    def _add_by_sample(self, base_TO: Tensor, x_TI: Tensor, decision: RoutingDecision, facts: BatchFacts) -> Tensor:
        shape = facts.context.sample_BS.shape
        gates_BK = decision.weights_RK[facts.sample_B]
        expert_ids_BJ = decision.expert_ids_RK[facts.sample_B]
        weights_BJ = expert_weights(gates_BK, self.settings)
        if self.settings.has_universal:
            universal_B1 = torch.full_like(expert_ids_BJ[:, :1], self.settings.num_experts)
            expert_ids_BJ = torch.cat((expert_ids_BJ, universal_B1), dim=1)
            weights_BJ = torch.cat((weights_BJ, 1 - gates_BK), dim=1)
        return add_sample_experts(
            base_TO,
            x_TI.view(*shape, -1),
            self.lora_A,
            self.lora_B,
            expert_ids_BJ=expert_ids_BJ,
            weights_BJ=weights_BJ * self.settings.scale,
        )

    def _add_by_token(self, base_TO: Tensor, x_TI: Tensor, decision: RoutingDecision, facts: BatchFacts) -> Tensor:
        by_token = decision.by_token(facts.context)
        E, scale = self.settings.num_experts, self.settings.scale
        weighted = by_token._replace(weights_RK=expert_weights(by_token.weights_RK, self.settings) * scale)
        out_TO = add_token_experts(base_TO, x_TI, self.lora_A[:E], self.lora_B[:E], decision=weighted)
        if not self.settings.has_universal:
            return out_TO
        universal_T1 = (1 - by_token.weights_RK) * scale
        return add_lora(out_TO, x_TI, self.lora_A[E], self.lora_B[E], scale=universal_T1)


def draw_a(a_rI: Tensor) -> None:
    """Draw one A as PEFT does: Kaiming's uniform, a = sqrt(5)."""
    nn.init.kaiming_uniform_(a_rI, a=math.sqrt(5))


def reset_table(table: nn.Embedding) -> None:
    """Draw rows of about unit length, which is that of a sentence encoder's centres."""
    nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)


def unknown_rows(gating: str) -> str:
    """What is missing where no row of a table can be looked up."""
    if gating == "dataset":
        return "the samples' datasets are not known; allowed: dataset_N in the routing context"
    return (
        "the instructions' clusters are not known; allowed: data.clusters in the recipe, or cluster_ids [B] beside "
        "input_ids"
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
