"""The adapters of a model as plain LoRAs: one a distinct row of the gates, whatever the number of clusters.

E experts (without the universal one)   r rank   I inputs, O outputs of a linear   R rows of the gates' table
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.attach import adapted_linears
from moe_lvlm.adapters.linear import AdaptedLinear
from moe_lvlm.adapters.merge import MergedLoRA, gate_table, merged_lora
from moe_lvlm.adapters.names import adapter_parameters
from moe_lvlm.checkpoint.source import WeightSource
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.models.build import VLM, build_empty
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.weights import replace_parameter

SINGLE = "lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainAdapter:
    """One plain LoRA. rows: of the table, for which the adapters compute this, in order; none for a single LoRA. gates:
    G of MoCLE eq. 1 by linear, float32 [E]; empty for a single LoRA."""

    name: str
    rows: tuple[int, ...]
    gates: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAdapters:
    """model: on meta tensors but for its adapters, which are float32. linears: the adapted ones by name, in the model's
    order. parameters: names of all parameters of adapters, gates and tables."""

    model: VLM
    settings: LoRASettings | MoCLESettings
    linears: Mapping[str, AdaptedLinear]
    parameters: frozenset[str]

    @property
    def rank(self) -> int:
        """Of each plain LoRA."""
        if not isinstance(self.settings, MoCLESettings):
            return self.settings.rank
        return self.settings.rank * (2 if self.settings.has_universal else self.settings.top_k)

    @property
    def alpha(self) -> float:
        """PEFT's `lora_alpha` of each plain LoRA."""
        return self.merged(next(iter(self.linears)), self._any_gates()).alpha

    def merged(self, linear: str, gates: Mapping[str, Tensor]) -> MergedLoRA:
        """One linear's matrices for the gates of a row (PlainAdapter.gates)."""
        return merged_lora(self.linears[linear], gates.get(linear))

    def _any_gates(self) -> dict[str, Tensor]:
        if not isinstance(self.settings, MoCLESettings):
            return {}
        gates_E = torch.zeros(self.settings.num_experts)
        gates_E[: self.settings.top_k] = 1.0
        return dict.fromkeys(self.linears, gates_E)


def read_adapters(config: VLMConfig, source: WeightSource) -> ReadAdapters:
    """The adapters of the model that a configuration describes, read from its weights; nothing else is read.

    Raises:
        ValueError: a model without adapters, or weights that lack one.
    """
    settings = config.adapter_settings
    if settings is None:
        raise ValueError("the model holds no adapters; allowed: one that was trained with model.adapter")
    with torch.random.fork_rng(devices=[]):  # even on meta tensors, initialisation moves the generator on
        model = build_empty(config)
    parameters = frozenset(adapter_parameters(model))
    available = frozenset(source.names())
    for name in sorted(parameters):
        if name not in available:
            raise ValueError(f"{name}: not among the {len(available)} tensors of the model")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        data = source.read(name).float()
        if data.shape != module.get_parameter(leaf).shape:
            raise ValueError(
                f"{name}: shape {tuple(data.shape)}; the model needs {tuple(module.get_parameter(leaf).shape)}"
            )
        replace_parameter(module, leaf, data)
    return ReadAdapters(model=model, settings=settings, linears=dict(adapted_linears(model)), parameters=parameters)


def plain_adapters(read: ReadAdapters, *, num_rows: int | None = None) -> tuple[PlainAdapter, ...]:
    """The distinct rows of the gates, in the order in which they come; clusters whose gates are equal in every linear
    share one.

    num_rows: the first so many rows of the table, those that data can ask for; None is all of them.

    Raises:
        ValueError: gates that read hidden states, so that there is no table.
    """
    settings = read.settings
    if not isinstance(settings, MoCLESettings):
        return (PlainAdapter(name=SINGLE, rows=(), gates={}),)
    check_table(settings)
    tables = gate_table(read.model)
    rows_of: dict[bytes, list[int]] = {}
    for row in range(settings.num_clusters if num_rows is None else num_rows):
        key = b"".join(table_RE[row].numpy().tobytes() for table_RE in tables.values())
        rows_of.setdefault(key, []).append(row)
    width = max(3, len(str(settings.num_clusters - 1)))
    return tuple(
        PlainAdapter(
            name=f"{settings.gating}-{rows[0]:0{width}d}",
            rows=tuple(rows),
            gates={name: table_RE[rows[0]] for name, table_RE in tables.items()},
        )
        for rows in rows_of.values()
    )


def check_table(settings: MoCLESettings) -> None:
    """ValueError where gates differ from sample to sample of one cluster, so that no plain LoRA equals them."""
    if not settings.reads_table:
        raise ValueError(
            f"adapter gating {settings.gating}: the gates read hidden states and differ from {_unit(settings)} to "
            f"{_unit(settings)}, so no plain LoRA computes this; allowed: gating cluster or dataset, or a single LoRA "
            "(kind: lora). tools/export.py model writes the model with our code"
        )


def _unit(settings: MoCLESettings) -> str:
    return "token" if settings.gating == "token" else "sample"


def target_modules(module_names: Sequence[str], adapted: Sequence[str]) -> list[str]:
    """PEFT's `target_modules` for exactly these modules of a base: their names as they end where no other module ends
    so, else their whole names.

    module_names: all modules of the base. adapted: those with an adapter.
    """
    wanted = set(adapted)
    short = sorted({name.rpartition(".")[2] for name in adapted})
    hit = {name for name in module_names if name.rpartition(".")[2] in short}
    return short if hit == wanted else sorted(wanted)


def module_names(model: nn.Module) -> list[str]:
    """Every module's name but those inside of adapted linears, which a base does not have."""
    inside = tuple(f"{name}." for name, _ in adapted_linears(model))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
