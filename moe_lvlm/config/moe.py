"""Typed settings of a mixture-of-experts model: which layers, how many experts, which router, which balance loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moe_lvlm.config.base import Settings

LayerPattern = Literal["sparse", "first_half", "second_half", "dense"]


class LinearGateSettings(Settings):
    """Scores are W x (LTDR eq. 6)."""

    kind: Literal["linear"] = "linear"


class CosineGateSettings(Settings):
    """GMoE's scores: the cosine between a learned projection of the token and an embedding of each expert, divided by
    a learned temperature.

    projection: width in which they are compared. temperature: where it starts.
    """

    kind: Literal["cosine"] = "cosine"
    projection: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.5, gt=0)


Gate = Annotated[LinearGateSettings | CosineGateSettings, Field(discriminator="kind")]


class RouterSettings(Settings):
    """What every token-choice router knows.

    gate: how a token is scored against the experts.
    renormalize: True divides the weights of the chosen experts by their sum, so that an upcycled model starts as the
        dense model; False is LTDR eq. 7 read literally.
    top1_weight: the weight of a token that one expert takes, under `renormalize`: `straight_through` has the value 1
        and the gradient of the probability, `probability` is the raw probability (DeepSpeed, Tutel).
    init: `normal` draws the gate from N(0, 0.02), `linear` is torch's own initialisation of a linear layer.
    second_choice_noise: `gumbel` chooses the second expert by scores with Gumbel noise, in training only (DeepSpeed's
        top-2 gate, which adds it at evaluation too).
    """

    gate: Gate = LinearGateSettings()
    renormalize: bool = True
    top1_weight: Literal["straight_through", "probability"] = "straight_through"
    init: Literal["normal", "linear"] = "normal"
    second_choice_noise: Literal["none", "gumbel"] = "none"


class TopKRouterSettings(RouterSettings):
    """Plain top-k, MoE-LLaVA's router and LTDR's baseline (LTDR eq. 6, 7)."""

    kind: Literal["top_k"] = "top_k"


class LongTailRouterSettings(RouterSettings):
    """LTDR's router: vision tail tokens use `tail_k` experts (LTDR eq. 9, 11, 12).

    tail_k: experts of a tail token; None means all of them.
    tail_scope: tokens whose mean variance is the tail's threshold in training: all vision tokens of the micro-batch,
        of each image by itself, or of all ranks.
    eval_tail_scope: the same outside training. `image` makes an answer independent of what else is in the batch.
    eea_select: which vision tokens use more experts (LTDR table 7): `vision_tail` (VTT), `vision_head` (VHT: the
        others), `instruction_aware` (IAT: those that the instruction attends to most; needs model.attention: eager,
        the only kind that gives attention weights), or `none` (LTDR's row without EEA).
    instruction_share: the share of each image's tokens that `instruction_aware` takes.
    """

    kind: Literal["ltdr"] = "ltdr"
    tail_k: int | None = Field(default=None, ge=1)
    tail_scope: Literal["batch", "image", "global"] = "batch"
    eval_tail_scope: Literal["batch", "image"] = "image"
    eea_select: Literal["vision_tail", "vision_head", "instruction_aware", "none"] = "vision_tail"
    instruction_share: float = Field(default=0.15, gt=0, le=1)


class TaskRouterSettings(RouterSettings):
    """Top-k, with a loss that steers samples of task i to expert i (LTDR's TASK, appendix A.3).

    coefficient: of the cross entropy between routing scores and the sample's task, a layer; ours, the paper gives none.
    """

    kind: Literal["task"] = "task"
    coefficient: float = Field(default=0.01, ge=0)


class ClusterRouterSettings(RouterSettings):
    """Samples are routed by a learned embedding of their instruction's cluster (LTDR's CLUSTER, after MoCLE).

    num_clusters, embedding_width: of the table of clusters (`data.clusters`), whose centres the embeddings start at;
        384 is the width of all-MiniLM-L6-v2.
    """

    kind: Literal["cluster"] = "cluster"
    num_clusters: int = Field(default=128, ge=1)
    embedding_width: int = Field(default=384, ge=1)


class InstructRouterSettings(RouterSettings):
    """Samples are routed by the mean hidden state of their instruction (LTDR's INSTRUCT, after LoRA-MoE)."""

    kind: Literal["instruct"] = "instruct"


class ModalityGroupRouterSettings(RouterSettings):
    """Vision tokens choose among the first `vision_experts` experts, language tokens among the rest (LTDR table 11).

    `top_k` counts within a group.
    """

    kind: Literal["modality_groups"] = "modality_groups"
    vision_experts: int = Field(default=2, ge=1)


class DynamicRouterSettings(RouterSettings):
    """Top-any gating with experts that come and go in training (LTDR's DYNAMIC, after DynMoE, arXiv 2405.14297).

    `num_experts` are allocated; the first `initial_experts` of them are active at the start, None means all. A token
    takes every active expert whose score is above the expert's threshold, so `top_k` is not read. The gate is DynMoE's
    own and nothing is ever dropped: the settings that all token-choice routers share keep their defaults.

    adapt_every: optimizer steps of a stage after which idle experts are dropped and one may be added; 0 means never.
        DynMoE's released code counts in 300 of every 900 forward passes; ours counts in all steps.
    coefficient: of the loss of diversity and simplicity, a layer; 0.01 is DynMoE's in MoE-LLaVA.
    temperature: scores and thresholds are divided by it before the sigmoid; not trained. DynMoE holds it above 0.01.
    """

    kind: Literal["dynamic"] = "dynamic"
    initial_experts: int | None = Field(default=None, ge=1)
    adapt_every: int = Field(default=300, ge=0)
    coefficient: float = Field(default=0.01, ge=0)
    temperature: float = Field(default=1.0, ge=0.01)

    @model_validator(mode="after")
    def _check_shared_settings(self) -> DynamicRouterSettings:
        for name, field in RouterSettings.model_fields.items():
            if getattr(self, name) != field.default:
                raise ValueError(f"{name}: {getattr(self, name)!r}: not read by dynamic; allowed: {field.default!r}")
        return self


class ConflictRouterSettings(RouterSettings):
    """Top-k, with a loss that moves tokens away from experts where their gradients conflict (LTDR's STGC).

    threshold: a token is in conflict at an expert where the cosine between its gradient on the expert's parameters and
        the expert's mean gradient is below it; 0, where they point apart, is ours.
    coefficient: of the conflict loss, a layer; ours. 0 counts conflicts and does nothing about them.

    Conflicts are found in the backward pass, so the loss has a gradient but no value that a log could show; the log
    counts the assignments in conflict (`conflicts`). Outside training nothing of this is computed.
    """

    kind: Literal["stgc"] = "stgc"
    threshold: float = Field(default=0.0, ge=-1, le=1)
    coefficient: float = Field(default=0.01, ge=0)


Router = Annotated[
    TopKRouterSettings
    | LongTailRouterSettings
    | TaskRouterSettings
    | ClusterRouterSettings
    | InstructRouterSettings
    | ModalityGroupRouterSettings
    | DynamicRouterSettings
    | ConflictRouterSettings,
    Field(discriminator="kind"),
]


class BalanceSettings(Settings):
    """The load-balancing loss, K * sum_i F_i G_i a layer, summed over layers (LTDR eq. 8, 10).

    on: modalities whose tokens are balanced, pooled into one loss: [language, vision] is the baseline, [language] is
        DAR, [vision] is "- LLB", [] is "- ALB".
    fraction: F_i counts top-1 choices (`top1`) or all assignments of a token (`all_choices`).
    """

    coefficient: float = Field(default=0.01, ge=0)
    on: tuple[Literal["language", "vision"], ...] = ("language", "vision")
    fraction: Literal["top1", "all_choices"] = "top1"

    @model_validator(mode="after")
    def _check_unique(self) -> BalanceSettings:
        if len(set(self.on)) != len(self.on):
            raise ValueError(f"on: each modality at most once, got {list(self.on)}")
        return self


class MoEConfig(Settings):
    """A mixture of experts in the place of a decoder's FFNs.

    layers: `sparse` (0, 2, 4, ...), `first_half`, `second_half`, `dense` (all), or a list of layer indices.
    num_experts: routed experts a layer. fine_grained = m cuts an FFN of width F into m experts of width F / m.
    top_k: experts a token uses; not read by `dynamic`, where it may be any number.
    shared_experts: full-width experts that every token passes with weight 1 (DeepSeekMoE).
    capacity_factor: None drops nothing. A number c lets each expert take ceil(top_k * c * T / num_experts) of a
        micro-batch's T positions, first choices first, then by position; what comes later is dropped (MoE-LLaVA: 1.5).
    eval_capacity_factor: the same outside training, where `capacity_factor` is set.
    """

    layers: LayerPattern | tuple[int, ...] = "sparse"
    num_experts: int = Field(default=4, ge=1)
    top_k: int = Field(default=2, ge=1)
    router: Router = TopKRouterSettings()
    balance: BalanceSettings = BalanceSettings()
    shared_experts: int = Field(default=0, ge=0)
    fine_grained: int = Field(default=1, ge=1)
    capacity_factor: float | None = Field(default=None, gt=0)
    eval_capacity_factor: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _check_counts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: {self.top_k} is above num_experts ({self.num_experts}); allowed: 1 to num_experts"
            )
        tail_k = getattr(self.router, "tail_k", None)
        if tail_k is not None and not self.top_k <= tail_k <= self.num_experts:
            raise ValueError(
                f"router.tail_k: {tail_k}; allowed: top_k ({self.top_k}) to num_experts ({self.num_experts})"
            )
        if isinstance(self.router, DynamicRouterSettings):
            if (self.router.initial_experts or 0) > self.num_experts:
                raise ValueError(
                    f"router.initial_experts: {self.router.initial_experts}; allowed: 1 to num_experts "
                    f"({self.num_experts}), or null for all"
                )
            if self.capacity_factor is not None:
                raise ValueError(f"capacity_factor: {self.capacity_factor}: dynamic drops nothing; allowed: null")
        if isinstance(self.router, ModalityGroupRouterSettings):
            smaller = min(self.router.vision_experts, self.num_experts - self.router.vision_experts)
            if smaller < self.top_k:
                raise ValueError(
                    f"router.vision_experts: {self.router.vision_experts} of {self.num_experts} experts; allowed: at "
                    f"least top_k ({self.top_k}) for vision and as many for language"
                )
        if self.capacity_factor is not None and self.router.kind in ("cluster", "instruct"):
            raise ValueError(
                f"capacity_factor: {self.capacity_factor}: {self.router.kind} decides for whole samples; allowed: null"
            )
        if self.router.second_choice_noise == "gumbel" and self.top_k != 2:
            raise ValueError(f"router.second_choice_noise: gumbel is for top_k 2, which is {self.top_k}")
        if self.num_experts % self.fine_grained:
            raise ValueError(
                f"fine_grained: {self.fine_grained} does not divide num_experts ({self.num_experts}); "
                "every slice of the dense FFN needs the same number of experts"
            )
        if isinstance(self.layers, tuple) and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: each index at most once, got {list(self.layers)}")
        return self

    @property
    def max_experts_per_token(self) -> int:
        """Routed experts that an ordinary token uses; the most that it may use where that is left to the router."""
        return self.num_experts if isinstance(self.router, DynamicRouterSettings) else self.top_k

    @property
    def needs_attention_weights(self) -> bool:
        """Whether routers read the weights of their layer's attention, which only the eager kind gives."""
        return isinstance(self.router, LongTailRouterSettings) and self.router.eea_select == "instruction_aware"

    @property
    def prompt_facts(self) -> frozenset[str]:
        """What a forward pass must be told of the prompt besides its tokens: of `instruction_mask`, `cluster_ids`."""
        needed = {"instruction_mask": self.needs_attention_weights or self.router.kind == "instruct"}
        needed["cluster_ids"] = self.router.kind == "cluster"
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the decoder layers that become sparse, ascending.

        Raises:
            ValueError: a listed index is not in 0 .. num_layers - 1, or no layer is left.
        """
        indices = self._layer_indices(num_layers)
        if not indices:
            raise ValueError(f"layers: {self.layers!r} names no layer of a model with {num_layers}")
        return indices

    def _layer_indices(self, num_layers: int) -> tuple[int, ...]:
        match self.layers:
            case "sparse":
                return tuple(range(0, num_layers, 2))
            case "first_half":
                return tuple(range(num_layers // 2))
            case "second_half":
                return tuple(range(num_layers // 2, num_layers))
            case "dense":
                return tuple(range(num_layers))
            case _:
                for index in self.layers:
                    if not 0 <= int(index) < num_layers:
                        raise ValueError(
                            f"layers: {index} is not a layer of this model; allowed: 0 to {num_layers - 1}"
                        )
                return tuple(sorted(int(index) for index in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, for a model's config.json."""
        return self.model_dump(mode="json")
