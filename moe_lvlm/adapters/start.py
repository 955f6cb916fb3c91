"""Where adapters start: drawn anew, from the centres of clusters, from a PEFT adapter.

E' experts, the universal one last   r rank   I inputs, O outputs of a linear   G width of an embedding
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_lvlm.adapters.attach import adapted_linears
from moe_lvlm.adapters.linear import AdaptedLinear, GatedAdapter, reset_table
from moe_lvlm.adapters.stacked import StackedAdapter
from moe_lvlm.adapters.table import TABLE
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Fields of a PEFT configuration that change what an adapter computes, with the values that leave it a plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
}


def start_adapters(decoder: nn.Module, settings: LoRASettings, *, centres_KG: Tensor | None = None) -> None:
    """Give every parameter of a decoder's adapters its first value.

    A as PEFT draws it and B 0, or of `start_from` alike for every expert, the universal one too; gates from N(0, 0.02);
    the table at the centres where they are given, else rows of about unit length. torch's generator draws.

    Raises:
        ValueError: centres that the table cannot take, or a `start_from` that does not fit.
    """
    linears = adapted_linears(decoder)
    for _, linear in linears:
        linear.reset_adapter()
    if (table := decoder._modules.get(TABLE)) is not None:
        assert isinstance(table, nn.Embedding)
        reset_table(table)
    if centres_KG is not None:
        start_tables(decoder, centres_KG)
    if settings.start_from is not None:
        _start_from_peft(linears, Path(settings.start_from), settings)


@torch.no_grad()
def start_tables(model: nn.Module, centres_KG: Tensor) -> int:
    """Let every table of adapters that are gated by cluster start at the centres; returns how many there are.

    Fewer centres than rows leave the rows beyond at 0, which no sample reads.

    Raises:
        ValueError: another width than the table's, or more centres than it has rows.
    """
    tables: list[nn.Embedding] = []
    for module in model.modules():
        if isinstance(module, GatedAdapter) and module.table is not None:
            tables.append(module.table)
    gated = [linear for _, linear in adapted_linears(model) if isinstance(linear, GatedAdapter)]
    if gated and gated[0].settings.gating == "cluster":
        shared = (module._modules.get(TABLE) for module in model.modules())
        tables += [table for table in shared if isinstance(table, nn.Embedding)]
    for table in tables:
        check_centres(centres_KG.shape[0], centres_KG.shape[1], gated[0].settings)
        table.weight.zero_()
        table.weight[: len(centres_KG)].copy_(centres_KG)
    return len(tables)


def check_centres(num_clusters: int, width: int, settings: MoCLESettings) -> None:
    """Whether the table can start at so many centres of this width.

    Raises:
        ValueError: another width than the table's, or more centres than it has rows.
    """
    if width != settings.embedding_width:
        raise ValueError(
            f"adapter.embedding_width: {settings.embedding_width}, but the centres of data.clusters are {width} wide; "
            f"allowed: {width}"
        )
    if num_clusters > settings.num_clusters:
        raise ValueError(
            f"adapter.num_clusters: {settings.num_clusters}, but data.clusters holds {num_clusters} clusters; allowed: "
            f"{num_clusters} or more"
        )


@torch.no_grad()
def _start_from_peft(linears: list[tuple[str, AdaptedLinear]], folder: Path, settings: LoRASettings) -> None:
    """Make every expert the PEFT adapter's LoRA. Where its scale differs from the settings', B takes the ratio."""
    stacked = next((name for name, linear in linears if isinstance(linear, StackedAdapter)), None)
    if stacked is not None:
        raise ValueError(
            f"adapter.start_from: {folder}, but {stacked} adapts the stacked matrices of experts, of which a PEFT adapter "
            "has none; allowed: adapter.target_modules without w1, w2, w3, or no start_from"
        )
    ratio = _peft_scale(folder, settings) / settings.scale
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"adapter.start_from: {path} is not there; allowed: a folder that PEFT saved as safetensors")
    with safe_open(path, framework="pt") as file:
        names = _names_by_linear(set(file.keys()), [name for name, _ in linears], path)
        read = {name: (file.get_tensor(a), file.get_tensor(b)) for name, (a, b) in names.items()}
    for name, linear in linears:
        a_rI, b_Or = read[name]
        for kind, given, expected in (("lora_A", a_rI, linear.lora_A[0]), ("lora_B", b_Or, linear.lora_B[0])):
            if given.shape != expected.shape:
                raise ValueError(
                    f"adapter.start_from: {path}: {kind} of {name} has shape {tuple(given.shape)}; allowed: "
                    f"{tuple(expected.shape)}"
                )
        linear.lora_A.copy_(a_rI.expand_as(linear.lora_A))
        linear.lora_B.copy_((b_Or.float() * ratio).expand_as(linear.lora_B))


def _peft_scale(folder: Path, settings: LoRASettings) -> float:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"adapter.start_from: {path} cannot be read ({error}); allowed: a PEFT adapter's folder"
        ) from error
    except ValueError as error:
        raise ValueError(f"adapter.start_from: {path} is no JSON: {error}") from error
    for field, allowed in _PLAIN.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(
                f"adapter.start_from: {path}: {field}: {config[field]!r}; allowed: {allowed[0]!r}, a plain LoRA"
            )
    rank = config.get("r")
    if rank != settings.rank:
        raise ValueError(f"adapter.start_from: {path}: r: {rank!r}; allowed: adapter.rank ({settings.rank})")
    alpha = config.get("lora_alpha", 8)
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _names_by_linear(keys: set[str], linears: list[str], path: Path) -> dict[str, tuple[str, str]]:
    """Keys of (A, B) for each linear. A PEFT file names linears from the model that it was made for, ours may stand
    elsewhere: all must stand under one prefix, and no key be left over."""
    prefixes = {
        key.removesuffix(f"{linears[0]}.lora_A.weight")
        for key in keys
        if _ends_with(key, f"{linears[0]}.lora_A.weight")
    }
    complete = []
    for prefix in sorted(prefixes):
        names = {name: (f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.lora_B.weight") for name in linears}
        wanted = {key for pair in names.values() for key in pair}
        if wanted == keys:
            return names
        complete.append((len(wanted - keys), sorted(wanted - keys), sorted(keys - wanted)))
    if not complete:
        raise ValueError(f"adapter.start_from: {path} holds no lora_A of {linears[0]}; it has {sorted(keys)[:3]} ...")
    _, missing, unexpected = min(complete)
    raise ValueError(
        f"adapter.start_from: {path} must hold the adapted linears' matrices and no other; missing: "
        f"{missing[:3]} ({len(missing)}), unexpected: {unexpected[:3]} ({len(unexpected)})"
    )


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")
