"""A trained model as one Hugging Face folder: weights in shards, configuration, processor, model card, checksums.

`stock` folders load with plain transformers; `native` folders bring our modelling code along. Weights are read and
written a few rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import LlavaConfig

from moe_lvlm.checkpoint.files import Advance
from moe_lvlm.checkpoint.model_folder import (
    DEFAULT_SHARD_BYTES,
    WrittenFolder,
    check_target,
    plan_shards,
    write_model_folder,
)
from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.conversion.export_check import ExportCheck, check_export, memory_available, memory_needed
from moe_lvlm.conversion.folder import without_paths
from moe_lvlm.conversion.model_card import CardFacts, render_card
from moe_lvlm.conversion.parameters import ParameterCounts, count_parameters
from moe_lvlm.conversion.processor_files import ProcessorFiles, processor_files
from moe_lvlm.conversion.provenance import Provenance, read_provenance
from moe_lvlm.conversion.remote_code import MODEL_CLASS, RemoteCode, remote_code
from moe_lvlm.conversion.stock import (
    NoStockFormError,
    StockForm,
    model_class_name,
    stock_form,
    stock_source,
)
from moe_lvlm.models.build import is_plain_llava, llava_config_of, open_weights
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.load import find_model
from moe_lvlm.routing.eea import has_eea, without_eea

Form = Literal["stock", "native"]
EEA_REPORT = "eea_report.json"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_CHECKED_SHARE = 0.5  # of the free memory: larger models are checked when they are asked for only


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What an export writes, before it does.

    source: folder with the weights. config: the trained model's, with EEA off if that was asked for. reason: why it is
    not stock, None where it is. tensors: what is written. num_bytes: of all weights.
    """

    source: Path
    form: Form
    architecture: str
    language_model: str
    reason: str | None
    caveats: tuple[str, ...]
    config: MoELlavaConfig
    exported_config: LlavaConfig
    code: RemoteCode | None
    tensors: LazySource
    dtype: torch.dtype
    num_bytes: int
    parameters: ParameterCounts
    provenance: Provenance
    processor: ProcessorFiles
    is_eea_off: bool

    @property
    def has_eea(self) -> bool:
        """Whether the trained model gives tail tokens more experts, exported so or not."""
        return self.is_eea_off or has_eea(self.config.moe_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """written: the folder. check: what comparing it with the trained model found, None if it was not compared;
    not_checked: why then."""

    plan: ExportPlan
    written: WrittenFolder
    check: ExportCheck | None
    not_checked: str | None


def plan_export(
    path: str | Path, *, format: str = "auto", dtype: torch.dtype | None = None, is_eea_off: bool = False
) -> ExportPlan:
    """Choose the form of an export. Reads headers and small files, no weight.

    path: a run, one of its checkpoints, or a model folder of ours. format: `stock`, `native`, or `auto`: stock where a
    stock architecture computes the same. dtype: of the weights; None is the widest among them. is_eea_off: switch off
    LTDR's extra experts for vision tail tokens.

    Raises:
        ValueError: none of these, or no stock architecture under `stock` (NoStockFormError).
    """
    if format not in ("auto", *get_args(Form)):
        raise ValueError(f"format: {format!r}; allowed: auto, {', '.join(get_args(Form))}")
    folder, processor_folder = find_model(path)
    if is_plain_llava(folder):
        raise ValueError(f"{folder}: transformers' own LLaVA already; nothing of ours is left to export")
    config = llava_config_of(folder)
    if is_eea_off:
        config = config.with_moe(without_eea(config.moe_config))
    choice = _choose_form(config, format)
    source = _untied(open_weights(folder), config)
    chosen = dtype or widest_dtype(source)
    renamed = source if choice.stock is None else stock_source(config, choice.stock, source)
    tensors = renamed.to(chosen)
    provenance = read_provenance(folder)
    return ExportPlan(
        source=folder,
        form="native" if choice.stock is None else "stock",
        architecture=choice.config.architectures[0],
        language_model=choice.language_model,
        reason=choice.reason,
        caveats=() if choice.stock is None else choice.stock.caveats,
        config=config,
        exported_config=_with_dtype(choice.config, chosen),
        code=remote_code() if choice.stock is None else None,
        tensors=tensors,
        dtype=chosen,
        num_bytes=plan_shards(tensors).num_bytes,
        parameters=count_parameters(source, config.moe_config),
        provenance=provenance,
        processor=processor_files(processor_folder, provenance),
        is_eea_off=is_eea_off,
    )


def export_model(
    plan: ExportPlan,
    target: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str = "unknown",
    eea_report: Mapping[str, Any] | None = None,
    is_checked: bool | None = None,
    is_overwriting: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> ExportResult:
    """Write a planned export, and compare what was written with the trained model.

    license: an identifier of the Hub, for the card. eea_report: of `evaluation.eea.measure_eea`, goes into the folder
    and the card. is_checked: None checks where the model fits well into the free memory. advance: told of the bytes of
    weights written, out of `plan.num_bytes`.

    Raises:
        ValueError: the target may not be written; or it computes something else (ExportCheckError), and stays to be
            looked at.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    check_license(license)
    folder = export_folder(plan.source, target, is_overwriting=is_overwriting)
    written = write_model_folder(
        folder,
        plan.tensors,
        documents=_documents(plan, license=license, eea_report=eea_report),
        max_shard_bytes=max_shard_bytes,
        is_overwriting=is_overwriting,
        advance=advance,
    )
    not_checked = None if is_checked is None else "as asked for"
    if is_checked is None:
        not_checked = check_refusal(plan)
        is_checked = not_checked is None
    check = None
    if is_checked:
        check = check_export(plan.source, plan.config, folder, dtype=plan.dtype, remote_code=plan.code)
    return ExportResult(plan=plan, written=written, check=check, not_checked=None if is_checked else not_checked)


def check_refusal(plan: ExportPlan) -> str | None:
    """Why an export is not checked unless that is asked for; None if it is."""
    needed, free = memory_needed(plan.parameters.total), memory_available()
    if needed <= _CHECKED_SHARE * free:
        return None
    return (
        f"a check takes {needed / 1e9:.1f} GB of memory, more than {_CHECKED_SHARE:.0%} of the {free / 1e9:.1f} GB "
        "that are free"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """stock: the stock form, None for a native one. reason: why it is not stock, None where that was not asked."""

    stock: StockForm | None
    reason: str | None
    config: LlavaConfig
    language_model: str


def _choose_form(config: MoELlavaConfig, format: str) -> _Choice:
    reason = None
    if format != "native":
        try:
            stock = stock_form(config)
        except NoStockFormError as error:
            if format == "stock":
                raise
            reason = str(error)
        else:
            return _Choice(stock=stock, reason=None, config=stock.config, language_model=stock.language_model)
    native = MoELlavaConfig.from_dict(config.to_dict())
    native.architectures = [MODEL_CLASS.rpartition(".")[2]]
    return _Choice(stock=None, reason=reason, config=native, language_model=model_class_name(config.text_config))


def _untied(source: WeightSource, config: MoELlavaConfig) -> LazySource:
    """The weights, without a head that is the embedding."""
    names = list(source.names())
    if config.tie_word_embeddings:
        names = [name for name in names if not name.startswith("lm_head.")]
    return LazySource({name: LazyTensor.from_source(source, name) for name in names})


def check_license(license: str) -> None:
    """ValueError for what cannot be an identifier of the Hub."""
    if not _LICENSE.fullmatch(license):
        raise ValueError(f"license: {license!r}; allowed: an identifier such as apache-2.0, llama2, other, unknown")


def export_folder(source: Path, target: str | Path, *, is_overwriting: bool) -> Path:
    """The folder to write into, absolute. ValueError if it may not be written, or holds what is exported."""
    folder = Path(target).absolute()
    if source.absolute().is_relative_to(folder):
        raise ValueError(f"{folder}: holds what is exported; choose another folder")
    check_target(folder, is_overwriting=is_overwriting)
    return folder


def widest_dtype(source: WeightSource) -> torch.dtype:
    """The type that holds all weights of a source without loss."""
    found = {source.dtype(name) for name in source.names()}
    floating: Sequence[torch.dtype] = [dtype for dtype in found if dtype.is_floating_point]
    return reduce(torch.promote_types, floating)


def _with_dtype(config: LlavaConfig, dtype: torch.dtype) -> LlavaConfig:
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    return config


def _documents(plan: ExportPlan, *, license: str, eea_report: Mapping[str, Any] | None) -> dict[str, bytes]:
    config = without_paths(json.loads(plan.exported_config.to_json_string()))
    if plan.code is not None:
        config["auto_map"] = dict(plan.code.auto_map)
    documents = {**plan.processor.files, "config.json": _json(config)}
    if plan.code is not None:
        documents |= plan.code.files
    if eea_report is not None:
        documents[EEA_REPORT] = _json(eea_report)
    documents["README.md"] = render_card(_card_facts(plan, license=license, eea_report=eea_report)).encode()
    return documents


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _card_facts(plan: ExportPlan, *, license: str, eea_report: Mapping[str, Any] | None) -> CardFacts:
    moe, num_layers = plan.config.moe_config, plan.config.text_config.num_hidden_layers
    return CardFacts(
        provenance=plan.provenance,
        form=plan.form,
        architecture=plan.architecture,
        language_model=plan.language_model,
        vision_tower=plan.config.vision_config.model_type,
        reason=plan.reason,
        caveats=plan.caveats,
        packages=() if plan.code is None else plan.code.packages,
        prompt=plan.processor.prompt,
        dtype=str(plan.dtype).removeprefix("torch."),
        parameters=plan.parameters,
        moe=moe,
        adapter=plan.config.adapter_settings,
        prompt_facts=plan.config.prompt_facts,
        layers=() if moe is None else moe.layer_indices(num_layers),
        num_layers=num_layers,
        is_eea_off=plan.is_eea_off,
        eea_report=eea_report,
        license=license,
    )
