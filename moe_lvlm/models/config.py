"""The configuration of our LLaVA."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, InstructBlipQFormerConfig, LlavaConfig

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig


class MoELlavaConfig(LlavaConfig):
    """LLaVA's configuration, a mixture of experts, and another connector than LLaVA's.

    moe: `MoEConfig.to_dict()`, or None for a dense model. language_head_bias: whether the language model's head has a
    bias, as Phi's has; LLaVA's own head has none.
    qformer: keys of InstructBlipQFormerConfig where a Q-Former stands in the place of LLaVA's projector, None where
    it does not. num_query_tokens: visual tokens that it makes of an image. experts: `ExpertSettings` of a Q-MoE as a
    mapping, None for a plain Q-Former.
    """

    model_type = "moe_llava"
    moe: dict[str, Any] | None = None
    language_head_bias: bool = False
    qformer: dict[str, Any] | None = None
    num_query_tokens: int = 32
    experts: dict[str, Any] | None = None

    @property
    def moe_config(self) -> MoEConfig | None:
        """The typed form of `moe`."""
        return None if self.moe is None else MoEConfig.model_validate(self.moe)

    @property
    def expert_settings(self) -> ExpertSettings | None:
        """The typed form of `experts`."""
        return None if self.experts is None else ExpertSettings.model_validate(self.experts)

    @property
    def qformer_config(self) -> InstructBlipQFormerConfig | None:
        """The typed form of `qformer`, with the kind of attention of the model."""
        if self.qformer is None:
            return None
        config = InstructBlipQFormerConfig.from_dict(self.qformer)
        config._attn_implementation = self._attn_implementation
        return config

    @property
    def is_answer_apart(self) -> bool:
        """Whether the answer is another sequence than the question (encoder-decoder): never in LLaVA."""
        return False

    @property
    def default_attention(self) -> str:
        """The kind of attention to load with: eager where routers read its weights, else sdpa."""
        moe = self.moe_config
        return "eager" if moe is not None and moe.needs_attention_weights else "sdpa"

    def with_moe(self, moe: MoEConfig | None) -> MoELlavaConfig:
        """A copy with another mixture of experts."""
        fields = self.to_dict()
        fields["moe"] = None if moe is None else moe.to_dict()
        return MoELlavaConfig.from_dict(fields)

    def with_experts(self, experts: ExpertSettings | None) -> MoELlavaConfig:
        """A copy whose Q-Former holds other experts, or none."""
        return MoELlavaConfig.from_dict(
            self.to_dict() | {"experts": None if experts is None else experts.model_dump(mode="json")}
        )


AutoConfig.register(MoELlavaConfig.model_type, MoELlavaConfig, exist_ok=True)
