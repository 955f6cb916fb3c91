"""Typed settings of a mixture-of-experts model: which layers, how many experts, which router, which balance loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moe_lvlm.config.base import Settings

LayerPattern = Literal["sparse", "first_half", "second_half", "dense"]


class RouterSettings(Settings):
    """What every token-choice router knows.

    renormalize: True divides the weights of the chosen experts by their sum, so that an upcycled model starts as the
        dense model; False is LTDR eq. 7 read literally.
    top1_weight: the weight of a token that one expert takes, under `renormalize`: `straight_through` has the value 1
        and the gradient of the probability, `probability` is the raw probability (DeepSpeed, Tutel).
    init: `normal` draws the gate from N(0, 0.02), `linear` is torch's own initialisation of a linear layer.
    """

    renormalize: bool = True
    top1_weight: Literal["straight_through", "probability"] = "straight_through"
    init: Literal["normal", "linear"] = "normal"


class TopKRouterSettings(RouterSettings):
    """Plain top-k, MoE-LLaVA's router and LTDR's baseline (LTDR eq. 6, 7)."""

    kind: Literal["top_k"] = "top_k"


class LongTailRouterSettings(RouterSettings):
    """LTDR's router: vision tail tokens use `tail_k` experts (LTDR eq. 9, 11, 12).

    tail_k: experts of a tail token; None means all of them.
    tail_scope: tokens whose mean variance is the tail's threshold in training: all vision tokens of the micro-batch,
        of each image by itself, or of all ranks.
    eval_tail_scope: the same outside training. `image` makes an answer independent of what else is in the batch.
    eea_select: which vision tokens use more experts: `vision_tail`, or `none` (LTDR's row without EEA).
    """

    kind: Literal["ltdr"] = "ltdr"
    tail_k: int | None = Field(default=None, ge=1)
    tail_scope: Literal["batch", "image", "global"] = "batch"
    eval_tail_scope: Literal["batch", "image"] = "image"
    eea_select: Literal["vision_tail", "none"] = "vision_tail"


Router = Annotated[TopKRouterSettings | LongTailRouterSettings, Field(discriminator="kind")]


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
    top_k: experts a token uses.
    shared_experts: full-width experts that every token passes with weight 1 (DeepSeekMoE).
    """

    layers: LayerPattern | tuple[int, ...] = "sparse"
    num_experts: int = Field(default=4, ge=1)
    top_k: int = Field(default=2, ge=1)
    router: Router = TopKRouterSettings()
    balance: BalanceSettings = BalanceSettings()
    shared_experts: int = Field(default=0, ge=0)
    fine_grained: int = Field(default=1, ge=1)

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
        if self.num_experts % self.fine_grained:
            raise ValueError(
                f"fine_grained: {self.fine_grained} does not divide num_experts ({self.num_experts}); "
                "every slice of the dense FFN needs the same number of experts"
            )
        if isinstance(self.layers, tuple) and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: each index at most once, got {list(self.layers)}")
        return self

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
