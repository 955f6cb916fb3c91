"""The table of embeddings that all gates of a decoder share (MoCLE's C), and how a batch reads it.

N samples   G width of an embedding
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.facts import are_rows_packed
from moe_lvlm.adapters.linear import AdaptedLinear, GatedAdapter, unknown_rows
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.routing.types import RoutingContext

TABLE = "adapter_table"


def look_up(decoder: nn.Module, context: RoutingContext) -> RoutingContext:
    """The context with what the decoder's adapters read of a table, and with what they would each count.

    A host calls this once a forward pass, before the decoder; on a decoder without LoRA experts it does nothing. What
    was decided at the prompt needs no table, so a call that goes on from a cache may come without clusters.

    Raises:
        ValueError: clusters or datasets are not known, or the table does not hold one.
    """
    adapter = next((module for module in decoder.modules() if isinstance(module, GatedAdapter)), None)
    if adapter is None:
        return context
    if context.is_packed is None:
        context = replace(context, is_packed=are_rows_packed(context.sample_BS))
    context = replace(context, num_samples=context.count_samples())
    if not adapter.settings.reads_table or (context.prompt is not None and adapter.site in context.prompt):
        return context
    row_N = _table_rows(adapter.settings, context)
    table = decoder._modules.get(TABLE)
    return context if table is None else replace(context, embedding_NG=table(row_N))


def _table_rows(settings: MoCLESettings, context: RoutingContext) -> Tensor:
    """Int64 [N], at least one: every rank calls the table."""
    num_samples = context.count_samples()
    if num_samples == 0:
        return torch.zeros(1, dtype=torch.int64, device=context.sample_BS.device)
    row_N = context.dataset_N if settings.gating == "dataset" else context.cluster_N
    if row_N is None:
        raise ValueError(f"adapter gating {settings.gating}: {unknown_rows(settings.gating)}")
    row_N = row_N[:num_samples]
    lowest, highest = row_N.aminmax()
    if int(lowest) < 0 or int(highest) >= settings.num_clusters:
        wrong = int(lowest) if int(lowest) < 0 else int(highest)
        raise ValueError(
            f"adapter gating {settings.gating}: {settings.gating} {wrong}; allowed: 0 to {settings.num_clusters - 1} "
            "(adapter.num_clusters rows)"
        )
    return row_N


def adapted_decoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose decoder layers (`.layers`) hold adapters, with their names; the model itself is ''."""
    found = []
    for name, module in model.named_modules():
        layers = module._modules.get("layers")
        if isinstance(layers, nn.ModuleList) and any(isinstance(one, AdaptedLinear) for one in layers.modules()):
            found.append((name, module))
    return found
