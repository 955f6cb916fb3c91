"""The public upcycling: a dense transformers model becomes a mixture of experts."""

from __future__ import annotations

from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration, MoELlavaModel
from moe_lvlm.moe.upcycle import moe_layers, upcycle_decoder


def upcycle(model: PreTrainedModel, config: MoEConfig) -> PreTrainedModel:
    """Turn the FFNs of a dense model into experts; the logits stay the same under the default settings (SPEC 4).

    A `LlavaForConditionalGeneration` comes back as `MoELlavaForConditionalGeneration` around the same parts; a causal
    language model (`LlamaForCausalLM`, ...) is changed in place, and routes every token as language.

    Raises:
        ValueError: a model that is sparse already, or whose decoder layers are not known.
    """
    if moe_layers(model):
        raise ValueError(f"{type(model).__name__} has mixture-of-experts layers already")
    if isinstance(model, LlavaForConditionalGeneration):
        sparse = as_moe_llava(model)
        upcycle_decoder(sparse.model.language_model, config)
        sparse.config.moe = config.to_dict()
        return sparse
    decoder = model.base_model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder layers at `{model.base_model_prefix}.layers`")
    upcycle_decoder(decoder, config)
    return model


def as_moe_llava(model: LlavaForConditionalGeneration) -> MoELlavaForConditionalGeneration:
    """Our class around the parts of a LLaVA model; ours comes back as it is."""
    if isinstance(model, MoELlavaForConditionalGeneration):
        return model
    from accelerate import init_empty_weights

    fields = model.config.to_dict()
    fields["model_type"] = MoELlavaConfig.model_type
    with init_empty_weights(include_buffers=True):
        ours = MoELlavaForConditionalGeneration(MoELlavaConfig.from_dict(fields))
    assert isinstance(ours.model, MoELlavaModel)
    ours.model.multi_modal_projector = model.model.multi_modal_projector
    ours.take_parts(tower=model.model.vision_tower, language_model=model.model.language_model, head=model.lm_head)
    ours.generation_config = model.generation_config
    return ours.train(model.training)
