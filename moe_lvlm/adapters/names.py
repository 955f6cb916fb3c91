"""Which parameters of a model are an adapter's."""

from __future__ import annotations

from torch import nn

from moe_lvlm.adapters.table import TABLE


def adapter_parameters(model: nn.Module) -> set[str]:
    """Names of the low-rank matrices, the gates and the tables of a model; empty without adapters.

    What is adapted keeps its own parameters, which are not among them.
    """
    names = set()
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        if "lora_A" in module._parameters:
            own = {name for name in module._parameters if not name.startswith("lora_")}
            names |= {f"{prefix}{name}" for name, _ in module.named_parameters() if name not in own}
        if TABLE in module._modules:
            names.add(f"{prefix}{TABLE}.weight")
    return names
