"""The configuration of our vision-language model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlavaConfig

from moe_lvlm.config.moe import MoEConfig


class MoELlavaConfig(LlavaConfig):
    """LLaVA's configuration and a mixture of experts.

    moe: `MoEConfig.to_dict()`, or None for a dense model. language_head_bias: whether the language model's head has a
    bias, as Phi's has; LLaVA's own head has none.
    """

    model_type = "moe_llava"
    moe: dict[str, Any] | None = None
    language_head_bias: bool = False

    @property
    def moe_config(self) -> MoEConfig | None:
        """The typed form of `moe`."""
        return None if self.moe is None else MoEConfig.model_validate(self.moe)

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


AutoConfig.register(MoELlavaConfig.model_type, MoELlavaConfig, exist_ok=True)
