"""LoRA, and LoRA experts chosen by a gate (MoCLE), on linear layers of a language model."""

from moe_lvlm.adapters.attach import adapted_linears, attach
from moe_lvlm.adapters.linear import AdaptedLinear, LoRAExpertLinear, LoRALinear
from moe_lvlm.adapters.merge import MergedLoRA, gate_table, merged_lora
from moe_lvlm.adapters.names import adapter_parameters
from moe_lvlm.adapters.start import start_adapters, start_tables
from moe_lvlm.adapters.table import adapted_decoders, look_up

__all__ = [
    "AdaptedLinear",
    "LoRAExpertLinear",
    "LoRALinear",
    "MergedLoRA",
    "adapted_decoders",
    "adapted_linears",
    "adapter_parameters",
    "attach",
    "gate_table",
    "look_up",
    "merged_lora",
    "start_adapters",
    "start_tables",
]
