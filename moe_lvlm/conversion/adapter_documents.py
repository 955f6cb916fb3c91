"""The small files of an export of adapters: PEFT's configuration of each, the index, and the README."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import moe_lvlm
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.config.yaml_text import dump_yaml
from moe_lvlm.conversion.adapter_base import AdapterBase
from moe_lvlm.conversion.adapter_rows import PlainAdapter, ReadAdapters, module_names, target_modules
from moe_lvlm.conversion.provenance import Provenance
from moe_lvlm.data.clusters import ClusterTable

FORMAT_VERSION = 1
# Files and folders of an export
ADAPTERS, BASE = "adapters", "base"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLUSTERS, CONNECTOR, INDEX = "clusters.safetensors", "connector.safetensors", "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What index and README tell.

    base_name: of a published model, None where it is not known. has_base: whether it is in the folder. connector: whether
    the trained one lies in a file of its own. row_names: of gates by dataset. merged: the one adapter that is in the
    weights. prompt: lines of Python that make `prompt`. license: an identifier of the Hub.
    """

    read: ReadAdapters
    base: AdapterBase
    base_name: str | None
    has_base: bool
    connector: bool
    adapters: Sequence[PlainAdapter]
    merged: PlainAdapter | None
    row_names: Sequence[str] | None
    table: ClusterTable | None
    dtype: torch.dtype
    provenance: Provenance
    notes: Sequence[str]
    prompt: str
    license: str

    @property
    def rows(self) -> dict[str, str]:
        """Cluster or dataset -> name of its adapter."""
        pairs = sorted((row, one.name) for one in self.adapters for row in one.rows)
        return {str(row) if self.row_names is None else self.row_names[row]: name for row, name in pairs}

    @property
    def unit(self) -> str:
        """What a row of the gates is."""
        settings = self.read.settings
        return settings.gating if isinstance(settings, MoCLESettings) else "model"

    @property
    def base_folder(self) -> str:
        """What a snippet loads."""
        if self.has_base:
            return BASE
        return self.base_name or "BASE_MODEL"


def as_json(value: Mapping[str, Any]) -> bytes:
    """Indented JSON. Raises ValueError on what JSON has no word for."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def adapter_config(facts: AdapterFacts) -> dict[str, Any]:
    """PEFT's `adapter_config.json`, the same for all adapters of an export."""
    read = facts.read
    alpha = read.alpha
    names = [theirs for ours in module_names(read.model) if (theirs := facts.base.name_of(ours)) is not None]
    adapted = [facts.base.name_of(ours) or ours for ours in read.linears]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE if facts.has_base else facts.base_name,
        "revision": None,
        "inference_mode": True,
        "r": read.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": read.settings.dropout,
        "use_rslora": read.settings.rslora,
        "target_modules": target_modules(names, adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def index(facts: AdapterFacts) -> dict[str, Any]:
    """`index.json`: which adapter is whose, with its gates, and what else lies in the folder."""
    rows_key = "datasets" if facts.row_names is not None else "clusters"
    table = facts.table
    return {
        "format_version": FORMAT_VERSION,
        "gating": facts.unit if facts.unit != "model" else None,
        "base": {
            "architecture": facts.base.architecture,
            "name": facts.base_name,
            "folder": BASE if facts.has_base else None,
            "connector": CONNECTOR if facts.connector else None,
        },
        rows_key: facts.rows,
        "adapters": {
            one.name: {
                "folder": f"{ADAPTERS}/{one.name}",
                rows_key: [_row_name(facts, row) for row in one.rows],
                "gates": {name: _gates(gates_E) for name, gates_E in one.gates.items()},
            }
            for one in facts.adapters
        },
        "assignment": None
        if table is None
        else {
            "table": CLUSTERS,
            "encoder": table.encoder,
            "num_clusters": table.num_clusters,
            "width": table.width,
            "rule": "the centre nearest to the instruction's embedding (Euclidean, the lowest of equal ones)",
        },
        "run": {"name": facts.provenance.name, "checkpoint": facts.provenance.checkpoint},
        "versions": _versions(),
    }


def _row_name(facts: AdapterFacts, row: int) -> int | str:
    return row if facts.row_names is None else facts.row_names[row]


def _gates(gates_E: torch.Tensor) -> dict[str, float]:
    return {str(expert): gate for expert, gate in enumerate(gates_E.tolist()) if gate}


def _versions() -> dict[str, str]:
    return {"moe-lvlm": moe_lvlm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def render_readme(facts: AdapterFacts) -> str:
    """The card as Markdown with its front matter."""
    loading = _use_merged if facts.merged is not None else _use_adapters
    parts = (_head(facts), loading(facts), _assign(facts), _what(facts), _origin(facts))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _head(facts: AdapterFacts) -> Iterator[str]:
    yield "---"
    yield f"license: {facts.license}"
    yield f"library_name: {'transformers' if facts.merged is not None else 'peft'}"
    yield "tags: [lora, mocle, vision-language]"
    if facts.base_name is not None and facts.base_name.count("/") == 1 and ":" not in facts.base_name:
        yield f"base_model: {json.dumps(facts.base_name)}"
    yield "---"
    yield f"# {facts.provenance.name}"
    yield ""
    if facts.merged is not None:
        yield (
            f"`{facts.base.architecture}` of plain transformers with one LoRA merged into its weights: {_whose(facts)}, out "
            "of a model of LoRA experts chosen by a gate (MoCLE), trained with moe-lvlm."
        )
    elif facts.unit == "model":
        yield f"A LoRA for `{facts.base.architecture}`, trained with moe-lvlm."
    else:
        yield (
            f"LoRA experts chosen by a gate (MoCLE), trained with moe-lvlm, as {len(facts.adapters)} plain LoRAs for "
            f"`{facts.base.architecture}`: with each {facts.unit}'s own, PEFT computes what the trained model computes."
        )
    for note in facts.notes:
        yield ""
        yield f"{note[0].upper()}{note[1:]}."


def _whose(facts: AdapterFacts) -> str:
    assert facts.merged is not None
    if facts.unit == "model":
        return "the model's one"
    return f"that of {facts.unit} {', '.join(str(_row_name(facts, row)) for row in facts.merged.rows)}"


def _auto(facts: AdapterFacts) -> str:
    return facts.base.auto_class.__name__


def _use_merged(facts: AdapterFacts) -> Iterator[str]:
    yield "## How to load it"
    yield ""
    yield "```python"
    yield f"from transformers import AutoProcessor, {_auto(facts)}"
    yield ""
    yield f'model = {_auto(facts)}.from_pretrained(".")  # this folder'
    yield 'processor = AutoProcessor.from_pretrained(".")'
    yield "```"


def _use_adapters(facts: AdapterFacts) -> Iterator[str]:
    first, *others = [one.name for one in facts.adapters]
    yield "## How to use it"
    yield ""
    yield "In this folder, with PEFT:"
    yield ""
    yield "```python"
    if others:
        yield "import json"
        yield ""
    yield "from peft import PeftModel"
    if facts.connector and facts.base.form == "vlm":
        yield "from safetensors.torch import load_file"
    yield f"from transformers import {_auto(facts)}"
    yield ""
    yield f'base = {_auto(facts)}.from_pretrained("{facts.base_folder}")'
    if facts.connector and facts.base.form == "vlm":
        yield f'base.load_state_dict(load_file("{CONNECTOR}"), strict=False)  # the connector was trained too'
    yield f'model = PeftModel.from_pretrained(base, "{ADAPTERS}/{first}", adapter_name="{first}").eval()'
    if others:
        yield f'adapters = json.load(open("{INDEX}"))["adapters"]'
        yield f'for name in adapters.keys() - {{"{first}"}}:'
        yield f'    model.load_adapter(f"{ADAPTERS}/{{name}}", adapter_name=name)'
        yield f'model.set_adapter("{others[-1]}")  # {facts.unit}s and names: {INDEX}'
    yield "```"
    yield ""
    yield "With a server that takes many LoRAs, such as vLLM where it knows the base:"
    yield ""
    yield "```bash"
    modules = " ".join(f"{name}={ADAPTERS}/{name}" for name in (first, *others[:1]))
    more = " ..." if len(others) > 1 else ""
    yield f"vllm serve {facts.base_folder} --enable-lora --max-lora-rank {facts.read.rank} --lora-modules {modules}{more}"
    yield "```"
    yield ""
    yield "A request then names its adapter as its model."


def _assign(facts: AdapterFacts) -> Iterator[str]:
    if facts.table is None or facts.merged is not None:
        return
    yield "## Which adapter an instruction takes"
    yield ""
    yield (
        f"That of its cluster: the centre in `{CLUSTERS}` that is nearest to the instruction's embedding (the first thing that "
        "the user says, without image marks)."
    )
    yield ""
    yield "```python"
    yield "import json"
    yield ""
    yield "from safetensors.numpy import load_file"
    yield "from sentence_transformers import SentenceTransformer"
    yield ""
    yield f'centres = load_file("{CLUSTERS}")["centres"]'
    yield f'(embedding,) = SentenceTransformer("{facts.table.encoder}").encode(["What is in this image?"])'
    yield "row = int(((centres - embedding) ** 2).sum(axis=1).argmin())"
    if facts.row_names is None:
        yield f'name = json.load(open("{INDEX}"))["clusters"][str(row)]'
    else:
        yield f'name = list(json.load(open("{INDEX}"))["datasets"].values())[row]'
    yield "```"


def _what(facts: AdapterFacts) -> Iterator[str]:
    read = facts.read
    yield "## What was trained"
    yield ""
    yield "```yaml"
    yield dump_yaml(read.settings.model_dump(mode="json") | {"start_from": None}).rstrip()
    yield "```"
    if facts.merged is None:
        yield ""
        yield (
            f"Each plain LoRA has rank {read.rank} and alpha {read.alpha:g} on {len(read.linears)} linear layers, in "
            f"{str(facts.dtype).removeprefix('torch.')}."
        )
        if facts.unit != "model":
            has_universal = getattr(read.settings, "has_universal", False)
            yield (
                f"`{INDEX}` holds the gates G of every linear: the expert has the weight "
                f"{'G squared' if has_universal and getattr(read.settings, 'compat', None) == 'released' else 'G'}"
                f"{', the universal one 1 - G' if has_universal else ''}."
            )


def _origin(facts: AdapterFacts) -> Iterator[str]:
    origin = facts.provenance
    yield "## Where it comes from"
    yield ""
    yield f"* run: {origin.name}" + (f", checkpoint {origin.checkpoint}" if origin.checkpoint else "")
    if facts.base_name is not None:
        yield f"* base: {facts.base_name}"
    if origin.steps is not None:
        yield f"* optimizer steps: {origin.steps}"
    yield f"* exported with: {', '.join(f'{name} {version}' for name, version in _versions().items())}"
    if facts.license == "unknown":
        yield "* licence: not stated; that of the base and of the data applies"
