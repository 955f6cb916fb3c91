"""The configuration of our InstructBLIP."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import AutoConfig, InstructBlipConfig

from moe_lvlm.models.config import MoELlavaConfig, VLMConfigParts


class MoEInstructBlipConfig(VLMConfigParts, InstructBlipConfig):
    """InstructBLIP's configuration, and:

    experts: of a Q-MoE (`ExpertSettings` as a mapping; None: its own Q-Former). adapter: `LoRASettings` or `MoCLESettings`
    of adapters in the language model as a mapping, None for none. The language model is dense.
    """

    model_type = "moe_instructblip"
    experts: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None

    @property
    def is_answer_apart(self) -> bool:
        """Whether the answer is another sequence than the question, as in encoder-decoder models."""
        return not self.use_decoder_only_language_model

    @property
    def default_attention(self) -> str:
        return "sdpa"


VLMConfig: TypeAlias = MoELlavaConfig | MoEInstructBlipConfig

AutoConfig.register(MoEInstructBlipConfig.model_type, MoEInstructBlipConfig, exist_ok=True)
