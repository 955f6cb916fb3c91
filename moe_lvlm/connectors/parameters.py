"""The size of a connector, counted without making it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.connectors.routers import ConnectorRouter


def connector_parameters(
    qformer_config: InstructBlipQFormerConfig,
    settings: ExpertSettings | None,
    *,
    num_queries: int,
    language_width: int,
) -> int:
    """Parameters as Q-MoE's table 5 counts them: the Q-Former with word and position embeddings and text FFNs, all
    experts but no routers, the query tokens, and the projection to the language model.

    settings: None is a plain Q-Former.
    """
    with torch.device("meta"):
        if settings is None:
            qformer = InstructBlipQFormerModel(qformer_config)
        else:
            qformer = QMoEModel(qformer_config, settings)
    routers = [module for module in qformer.modules() if isinstance(module, ConnectorRouter)]
    width = qformer_config.hidden_size
    projection = (width + 1) * language_width
    return _count(qformer) - sum(map(_count, routers)) + num_queries * width + projection


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
