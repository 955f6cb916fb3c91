"""The configuration of our InstructBLIP."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import AutoConfig, InstructBlipConfig

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.models.config import MoELlavaConfig


class MoEInstructBlipConfig(InstructBlipConfig):
    """InstructBLIP's configuration, and the experts of a Q-MoE (`ExpertSettings` as a mapping; None: its own Q-Former).

    The language model is dense.
    """

    model_type = "moe_instructblip"
    experts: dict[str, Any] | None = None

    @property
    def moe_config(self) -> None:
        """No mixture of experts in the language model."""
        return None

    @property
    def expert_settings(self) -> ExpertSettings | None:
        """The typed form of `experts`."""
        return None if self.experts is None else ExpertSettings.model_validate(self.experts)

    @property
    def is_answer_apart(self) -> bool:
        """Whether the answer is another sequence than the question, as in encoder-decoder models."""
        return not self.use_decoder_only_language_model

    @property
    def default_attention(self) -> str:
        return "sdpa"

    def with_experts(self, experts: ExpertSettings | None) -> MoEInstructBlipConfig:
        """A copy whose Q-Former holds other experts, or none."""
        return MoEInstructBlipConfig.from_dict(
            self.to_dict() | {"experts": None if experts is None else experts.model_dump(mode="json")}
        )


VLMConfig: TypeAlias = MoELlavaConfig | MoEInstructBlipConfig

AutoConfig.register(MoEInstructBlipConfig.model_type, MoEInstructBlipConfig, exist_ok=True)
