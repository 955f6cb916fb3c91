"""Adapters in the language model of a whole model.

K clusters   G width of an embedding
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lvlm.adapters import attach, start_adapters
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.data.packs import resolve


def attach_adapter(model: PreTrainedModel, settings: LoRASettings | MoCLESettings) -> None:
    """Put adapters into the language model of our LLaVA or InstructBLIP, in place; meta tensors stay meta tensors.

    Raises:
        ValueError: there are adapters already, or targets that the decoder does not have.
    """
    with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again at the start
        attach(model.get_decoder(), settings)
    model.config.adapter = settings.model_dump(mode="json")


def start_adapter(
    model: PreTrainedModel, settings: LoRASettings | MoCLESettings, *, seed: int, centres_KG: Tensor | None = None
) -> None:
    """Give a model's adapters their first values, drawn from `seed`, the same however experts are spread; the model's
    function stays, unless `start_from` gives them one.

    centres_KG: of the clusters, where gates begin by them.

    Raises:
        ValueError: a start that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start_adapters(model.get_decoder(), _resolved(settings), centres_KG=centres_KG)


def _resolved(settings: LoRASettings | MoCLESettings) -> LoRASettings | MoCLESettings:
    """`start_from` may be in a pack."""
    if settings.start_from is None:
        return settings
    return settings.model_copy(update={"start_from": str(resolve(settings.start_from))})


def adapt(
    model: PreTrainedModel, settings: LoRASettings | MoCLESettings, *, seed: int, centres_KG: Tensor | None = None
) -> None:
    """Both, for a model that is there whole."""
    attach_adapter(model, settings)
    start_adapter(model, settings, seed=seed, centres_KG=centres_KG)
