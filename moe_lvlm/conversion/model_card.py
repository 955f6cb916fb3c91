"""README.md of an exported model: what it is, how to load it, what it was trained on, how well it does, where from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
import transformers

import moe_lvlm
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.connector import PartSettings
from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig
from moe_lvlm.config.recipe import SourceSettings
from moe_lvlm.config.yaml_text import dump_yaml
from moe_lvlm.conversion.parameters import ParameterCounts
from moe_lvlm.conversion.provenance import Provenance


class _PromptFact(NamedTuple):
    """text: what it is. line: of the snippet, that makes one."""

    text: str
    line: str


# What a forward pass must be told of the prompt, by `VLMConfigParts.prompt_facts`
_PROMPT_FACTS = {
    "instruction_mask": _PromptFact(
        "[B, S], 1 at the user's words; the snippet counts the template's words among them, training did not",
        'inputs["instruction_mask"] = (inputs["input_ids"] != model.config.image_token_id).long()',
    ),
    "cluster_ids": _PromptFact(
        "[B], the cluster of each row's instruction in the table that the model was trained with (`data.clusters`)",
        'inputs["cluster_ids"] = inputs["input_ids"].new_zeros(1)  # write the instruction\'s own cluster here',
    ),
    "dataset_ids": _PromptFact(
        "[B], the index in the training mixture of the dataset that each row is like",
        'inputs["dataset_ids"] = inputs["input_ids"].new_zeros(1)  # write the dataset\'s own index here',
    ),
}
# Whose vision tokens take more experts than others, by `router.eea_select`
_SELECTED = {
    "vision_tail": "Vision tokens of the long tail",
    "vision_head": "Vision tokens outside the long tail",
    "instruction_aware": "The vision tokens that the instruction attends to most",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything that a card tells.

    form: `stock` or `native`. architecture: the class that loads it. language_model: the class inside. reason: why it
    has this form. packages: what remote code needs. prompt: lines of Python that make `prompt`. layers: decoder layers
    with experts, num_layers: all. adapter: in the language model. prompt_facts: what a forward pass must be told besides
    tokens. license: an identifier of the Hub.
    """

    provenance: Provenance
    form: str
    architecture: str
    language_model: str
    vision_tower: str
    reason: str | None
    caveats: Sequence[str]
    packages: Sequence[str]
    prompt: str
    dtype: str
    parameters: ParameterCounts
    moe: MoEConfig | None
    adapter: LoRASettings | None
    prompt_facts: frozenset[str]
    layers: Sequence[int]
    num_layers: int
    is_eea_off: bool
    eea_report: Mapping[str, Any] | None
    license: str


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with its front matter."""
    sections = (
        _front_matter(facts), _head(facts), _loading(facts), _model(facts), _routing(facts), _adapter(facts), _eea(facts),
        _training(facts), _scores(facts), _origin(facts),
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"


def _front_matter(facts: CardFacts) -> Iterator[str]:
    tags = ["llava", "vision-language", *(["mixture-of-experts"] if facts.moe else [])]
    if facts.form == "native":
        tags.append("custom_code")
    yield "---"
    yield f"license: {facts.license}"
    yield "library_name: transformers"
    yield "pipeline_tag: image-text-to-text"
    yield f"tags: [{', '.join(tags)}]"
    if base := base_models(facts.provenance):
        yield f"base_model: {json.dumps(base)}"
    yield "---"


def _head(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.provenance.name}"
    yield ""
    kind = "mixture-of-experts vision-language model" if facts.moe else "vision-language model"
    yield f"A {kind}: `{facts.vision_tower}`, a projector, and `{facts.language_model}`, trained with moe-lvlm."
    yield ""
    if facts.form == "stock":
        yield f"It loads with plain transformers as `{facts.architecture}`; no code comes with it."
    else:
        yield (
            f"It loads with transformers and the code in this folder (`{facts.architecture}`, "
            f"`trust_remote_code=True`), which needs {_listed(facts.packages)}."
        )
    if facts.reason:
        yield ""
        yield f"Why not a stock architecture: {facts.reason}."
    for caveat in facts.caveats:
        yield ""
        yield caveat


def _loading(facts: CardFacts) -> Iterator[str]:
    options = ", trust_remote_code=True" if facts.form == "native" else ""
    if facts.moe is not None and facts.moe.needs_attention_weights:
        options += ', attn_implementation="eager"'
    yield "## How to load it"
    yield ""
    yield "```python"
    yield "from PIL import Image"
    yield "from transformers import AutoModelForImageTextToText, AutoProcessor"
    yield ""
    yield 'folder = "."  # this folder, or its name on a hub'
    yield f"model = AutoModelForImageTextToText.from_pretrained(folder{options})"
    yield "processor = AutoProcessor.from_pretrained(folder)"
    yield ""
    yield 'image = Image.open("image.png").convert("RGB")'
    yield facts.prompt
    yield 'inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")'
    for name in sorted(facts.prompt_facts):
        yield _PROMPT_FACTS[name].line
    yield "answer = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)"
    yield 'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    yield "```"
    for name in sorted(facts.prompt_facts):
        yield ""
        yield f"Its routers or gates also want `{name}` beside `input_ids`, in `forward` and `generate`: {_PROMPT_FACTS[name].text}."
    if facts.form == "native":
        yield ""
        yield "With moe-lvlm installed, `moe_lvlm.load(folder)` gives model and processor without remote code."


def _model(facts: CardFacts) -> Iterator[str]:
    counts = facts.parameters
    yield "## Size"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| parameters | {counts.total:,} |"
    if facts.moe:
        yield f"| activated for a token{', at most' if facts.moe.router.kind == 'dynamic' else ''} | {counts.activated:,} |"
    if counts.activated_tail is not None:
        yield f"| activated for a vision tail token | {counts.activated_tail:,} |"
    yield f"| type | {facts.dtype} |"
    yield ""
    yield "Tower, projector and embeddings are counted in all of these."


def _routing(facts: CardFacts) -> Iterator[str]:
    if facts.moe is None:
        return
    moe = facts.moe
    yield "## Experts and routing"
    yield ""
    where = ", ".join(map(str, facts.layers))
    choice = "a token takes any number of them" if moe.router.kind == "dynamic" else f"top {moe.top_k}"
    yield f"{moe.num_experts} experts in decoder layers {where} (of {facts.num_layers}, from 0); {choice}."
    if moe.shared_experts:
        yield f"Shared experts: {moe.shared_experts}, passed by every token with weight 1."
    if moe.fine_grained > 1:
        yield f"An expert is 1/{moe.fine_grained} of a dense FFN wide."
    router = moe.router
    if isinstance(router, LongTailRouterSettings) and router.eea_select != "none":
        yield f"{_SELECTED[router.eea_select]} take {router.tail_k or moe.num_experts} experts (LTDR)."
    yield ""
    yield "```yaml"
    yield dump_yaml(moe.to_dict()).rstrip()
    yield "```"


def _adapter(facts: CardFacts) -> Iterator[str]:
    if facts.adapter is None:
        return
    yield "## Adapters"
    yield ""
    kind = "LoRA experts chosen by a gate (MoCLE)" if isinstance(facts.adapter, MoCLESettings) else "A LoRA"
    yield f"{kind} in the language model."
    yield ""
    yield "```yaml"
    yield dump_yaml(facts.adapter.model_dump(mode="json") | {"start_from": None}).rstrip()
    yield "```"


def _eea(facts: CardFacts) -> Iterator[str]:
    if facts.eea_report is None:
        return
    report = facts.eea_report
    state = "switched off in this export" if facts.is_eea_off else "on in this export"
    yield "## What extra experts for tail tokens (EEA) change"
    yield ""
    yield f"EEA is {state}. The full report is `eea_report.json`."
    yield ""
    yield from eea_table(report)


def eea_table(report: Mapping[str, Any]) -> Iterator[str]:
    """A report of `evaluation/eea.py` as lines of Markdown."""
    if report.get("samples") is None:
        yield f"It could not be measured: {report['reason']}."
        return
    logits, rows, answers = report["logits"], report["rows_per_token"], report["answers"]
    yield f"Measured on {report['samples']} samples of {report['source']}."
    yield ""
    yield "| | with EEA | without |"
    yield "|---|---|---|"
    yield f"| rows per token | {rows['with_eea']:.3f} | {rows['without_eea']:.3f} |"
    yield f"| rows per vision token | {_number(rows['vision_with_eea'])} | {_number(rows['vision_without_eea'])} |"
    if (score := answers.get("exact_match")) is not None:
        yield f"| exact match | {score['with_eea']:.3f} | {score['without_eea']:.3f} |"
    yield ""
    tail = report["tail_share"].items()
    yield "| change when it is switched off | |"
    yield "|---|---|"
    shares = "; ".join(f"{layer}: {_percent(share)}" for layer, share in tail)
    yield f"| vision tokens in the tail, by layer | {shares} |"
    yield f"| logits at answer positions, mean and largest difference | {logits['mean_abs']:.3g}, {logits['max_abs']:.3g} |"
    yield f"| KL divergence at answer positions, mean and largest | {logits['mean_kl']:.3g}, {logits['max_kl']:.3g} |"
    yield f"| same greedy next token | {_percent(logits['greedy_agreement'])} of {logits['positions']} |"
    yield f"| generated answers that differ | {answers['different']} of {answers['generated']} |"


def _training(facts: CardFacts) -> Iterator[str]:
    origin = facts.provenance
    if origin.recipe is None:
        return
    yield "## Training"
    yield ""
    yield "| stage | trains | steps or epochs | batch | learning rate | data (weight) |"
    yield "|---|---|---|---|---|---|"
    for stage in origin.recipe.stages:
        length = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
        trains = ", ".join(f"`{part}`" for part in stage.train) + (" (upcycled)" if stage.upcycle else "")
        mixture = "; ".join(map(_source, stage.mixture or origin.recipe.data.mixture))
        yield f"| {stage.name} | {trains} | {length} | {stage.global_batch} | {stage.learning_rate:g} | {mixture} |"
    yield ""
    yield "Data is read in the LLaVA layout; each dataset has its own licence."


def _source(source: SourceSettings) -> str:
    return f"{source.name or PurePosixPath(source.path).stem} ({source.weight:g})"


def _scores(facts: CardFacts) -> Iterator[str]:
    if not facts.provenance.scores:
        return
    yield "## Scores"
    yield ""
    yield "| task | accuracy | majority | n |"
    yield "|---|---|---|---|"
    for task, score in facts.provenance.scores.items():
        yield f"| {task} | {_number(score.get('accuracy'))} | {_number(score.get('majority'))} | {score.get('n', '')} |"
    yield ""
    yield (
        "Greedy answers, scored by each evaluation set's own metric; `majority` always gives the commonest answer. Of "
        "captions the number is CIDEr, where 1.0 is printed as 100 elsewhere."
    )
    if facts.is_eea_off:
        yield "It measured the model with EEA on, which this export has switched off."


def _origin(facts: CardFacts) -> Iterator[str]:
    origin = facts.provenance
    yield "## Where it comes from"
    yield ""
    yield f"* run: {origin.name}" + (f", checkpoint {origin.checkpoint}" if origin.checkpoint else "")
    if origin.steps is not None:
        yield f"* optimizer steps: {origin.steps}" + (f"; tokens: {origin.tokens:,}" if origin.tokens else "")
    for part, name in named_parts(origin):
        yield f"* {part}: {name}"
    if origin.versions:
        yield f"* trained with: {', '.join(f'{name} {version}' for name, version in origin.versions.items())}"
    versions = {"moe-lvlm": moe_lvlm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    if "pydantic" in facts.packages:
        versions["pydantic"] = metadata.version("pydantic")
    yield f"* exported with: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    if facts.license == "unknown":
        yield "* licence: not stated; that of the parts and the data that it was made from applies"


def named_parts(origin: Provenance) -> Iterator[tuple[str, str]]:
    """Pretrained parts by name. Of a path only its end is told."""
    if origin.recipe is None:
        return
    model = origin.recipe.model
    if model.from_pretrained is not None:
        yield "started from", public_name(model.from_pretrained)
    parts: tuple[tuple[str, PartSettings | None], ...] = (
        ("vision tower", model.vision_tower),
        ("language model", model.language_model),
    )
    for part, settings in parts:
        if settings is not None and settings.from_pretrained is not None:
            yield part, public_name(settings.from_pretrained)


def base_models(origin: Provenance) -> list[str]:
    """Names of parts that are names on a hub, `owner/name`."""
    return [name for _, name in named_parts(origin) if name.count("/") == 1 and ":" not in name]


def public_name(name: str) -> str:
    """A hub's name or a package's path as it is; of a path on this machine its end."""
    is_path = name.count("/") > 1 or name.startswith(("/", ".", "~")) or Path(name).exists()
    return PurePosixPath(name).name if is_path and not name.startswith("package:") else name


def _listed(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"
