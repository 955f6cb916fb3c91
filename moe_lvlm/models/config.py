"""The configuration of our LLaVA, and what it shares with our InstructBLIP's."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from transformers import AutoConfig, InstructBlipQFormerConfig, LlavaConfig, PreTrainedConfig

from moe_lvlm.config.adapter import LoRASettings, MoCLESettings, read_adapter
from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig


class VLMConfigParts:
    """Typed forms of what our configurations add to those of transformers. moe: None where it is no field."""

    moe: dict[str, Any] | None = None
    experts: dict[str, Any] | None
    adapter: dict[str, Any] | None

    @property
    def moe_config(self) -> MoEConfig | None:
        """The mixture of experts in the language model; None for a dense one."""
        return None if self.moe is None else MoEConfig.model_validate(self.moe)

    @property
    def expert_settings(self) -> ExpertSettings | None:
        """The experts of a Q-MoE; None for another connector."""
        return None if self.experts is None else ExpertSettings.model_validate(self.experts)

    @property
    def adapter_settings(self) -> LoRASettings | MoCLESettings | None:
        """The adapters in the language model; None for none."""
        return None if self.adapter is None else read_adapter(self.adapter)

    @property
    def has_gated_adapter(self) -> bool:
        """Whether gates choose among LoRA experts. Asked in every forward pass, so nothing is validated here."""
        return self.adapter is not None and self.adapter["kind"] == "mocle"

    @property
    def is_routed(self) -> bool:
        """Whether anything in the model makes routing decisions; as cheap."""
        return self.moe is not None or self.experts is not None or self.has_gated_adapter

    @property
    def prompt_facts(self) -> frozenset[str]:
        """What a forward pass must be told of the prompt besides its tokens: of `instruction_mask`, `cluster_ids`,
        `dataset_ids`."""
        moe, adapter = self.moe_config, self.adapter_settings
        facts = frozenset() if moe is None else moe.prompt_facts
        return facts | adapter.prompt_facts if isinstance(adapter, MoCLESettings) else facts


_Config = TypeVar("_Config", bound=PreTrainedConfig)


def with_fields(config: _Config, **fields: Any) -> _Config:
    """A copy of a configuration with other values of some of its fields."""
    return cast(_Config, type(config).from_dict(config.to_dict() | fields))


class MoELlavaConfig(VLMConfigParts, LlavaConfig):
    """LLaVA's configuration, a mixture of experts, and another connector than LLaVA's.

    moe: `MoEConfig.to_dict()`, or None for a dense model. language_head_bias: whether the language model's head has a
    bias, as Phi's has; LLaVA's own head has none.
    qformer: keys of InstructBlipQFormerConfig where a Q-Former stands in the place of LLaVA's projector, None where
    it does not. num_query_tokens: visual tokens that it makes of an image. experts: `ExpertSettings` of a Q-MoE as a
    mapping, None for a plain Q-Former. adapter: `LoRASettings` or `MoCLESettings` of adapters in the language model as a
    mapping, None for none.
    """

    model_type = "moe_llava"
    moe: dict[str, Any] | None = None
    language_head_bias: bool = False
    qformer: dict[str, Any] | None = None
    num_query_tokens: int = 32
    experts: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None

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
        return with_fields(self, moe=None if moe is None else moe.to_dict())


AutoConfig.register(MoELlavaConfig.model_type, MoELlavaConfig, exist_ok=True)
