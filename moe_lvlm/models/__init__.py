"""The vision-language model: configuration, model, building, loading, upcycling."""

from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration, MoELlavaModel, MoELlavaOutput

__all__ = ["MoELlavaConfig", "MoELlavaForConditionalGeneration", "MoELlavaModel", "MoELlavaOutput"]
