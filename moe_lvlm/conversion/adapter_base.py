"""What a model's adapters are put on by other programs: a stock LLaVA or InstructBLIP, or the language model alone.

O outputs, I inputs of a linear
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from moe_lvlm.adapters.merge import MergedLoRA
from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.conversion.adapter_rows import ReadAdapters
from moe_lvlm.conversion.stock import NoStockFormError, disk_name, stock_form
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig, VLMConfig

Form = Literal["vlm", "language_model"]
FORMS = get_args(Form)

# In memory, ours and transformers' alike
_CONNECTOR = ("model.multi_modal_projector.", "query_tokens", "qformer.", "language_projection.")
# The language model in ours -> in a causal language model of its own
_ALONE = (("model.language_model.", "model."), ("lm_head.", "lm_head."), ("language_model.", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """A class of plain transformers that adapters are put on.

    form: the whole model, or its language model alone. architecture: the class. config: its own. reason: why it is not
    the whole model, None where it is, or where that was not asked.
    """

    form: Form
    architecture: str
    config: PreTrainedConfig
    reason: str | None = None

    @property
    def auto_class(self) -> type:
        """The auto class of transformers that loads it."""
        return AutoModelForImageTextToText if self.form == "vlm" else AutoModelForCausalLM

    def name_of(self, ours: str) -> str | None:
        """A module's or weight's name in the base, in memory; None for what the base does not have."""
        if self.form == "vlm":
            return ours
        for prefix, theirs in _ALONE:
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
        return None

    def disk_name(self, theirs: str) -> str:
        """A weight's name in the base's folder."""
        return disk_name(theirs) if self.architecture == LlavaForConditionalGeneration.__name__ else theirs

    def new_model(self) -> PreTrainedModel:
        """The class with random weights, of the type that torch makes by default."""
        if self.form == "language_model":
            return AutoModelForCausalLM.from_config(self.config)
        classes = (LlavaForConditionalGeneration, InstructBlipForConditionalGeneration)
        return next(one for one in classes if one.__name__ == self.architecture)(self.config)


def choose_base(config: VLMConfig, form: str = "auto") -> AdapterBase:
    """The base of a model's adapters. form: `vlm`, `language_model`, or `auto`, the whole model where a stock class has
    its form.

    Raises:
        ValueError: another form, a mixture of experts, a connector that no stock class has, or no stock class under `vlm`.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"format: {form!r}; allowed: auto, {', '.join(FORMS)}")
    if config.moe_config is not None:
        raise ValueError(
            "the language model holds a mixture of experts beside its adapters: no published base has its weights; "
            "allowed: adapters on a dense language model. tools/export.py model writes the model with our code"
        )
    if config.expert_settings is not None or (isinstance(config, MoELlavaConfig) and config.qformer is not None):
        kind = "Q-MoE" if config.expert_settings is not None else "Q-Former beside a language model of its own choice"
        raise ValueError(
            f"connector: a {kind} has no stock form, so PEFT and other programs have no base to put adapters on; "
            "allowed: LLaVA's projector, or an InstructBLIP's own Q-Former"
        )
    reason = None
    if form != "language_model":
        try:
            return _whole(config)
        except NoStockFormError as error:
            if form == "vlm":
                raise
            reason = str(error)
    text = type(config.text_config).from_dict(config.text_config.to_dict())
    text.architectures = [_causal_class(text)]
    return AdapterBase(form="language_model", architecture=text.architectures[0], config=text, reason=reason)


def _whole(config: VLMConfig) -> AdapterBase:
    if isinstance(config, MoEInstructBlipConfig):
        if config.is_answer_apart:
            raise NoStockFormError("adapters: known for decoder-only language models")
        fields = config.to_dict()
        for ours in ("experts", "adapter", "model_type", "architectures", "transformers_version", "auto_map"):
            fields.pop(ours, None)
        stock = InstructBlipConfig.from_dict(fields)
        stock.architectures = [InstructBlipForConditionalGeneration.__name__]
        return AdapterBase(form="vlm", architecture=stock.architectures[0], config=stock)
    bare = MoELlavaConfig.from_dict(config.to_dict() | {"adapter": None})
    return AdapterBase(form="vlm", architecture=LlavaForConditionalGeneration.__name__, config=stock_form(bare).config)


def _causal_class(text: PreTrainedConfig) -> str:
    return AutoModelForCausalLM._model_mapping[type(text)].__name__


def is_connector(name: str) -> bool:
    """Whether a weight is the connector's."""
    return name.startswith(_CONNECTOR)


def connector_source(source: WeightSource) -> LazySource:
    """The connector's weights under their names in the base, in memory."""
    names = [name for name in source.names() if is_connector(name)]
    return LazySource({name: LazyTensor.from_source(source, name) for name in names})


def base_source(
    base: AdapterBase, read: ReadAdapters, source: WeightSource, merged: Mapping[str, MergedLoRA] | None = None
) -> LazySource:
    """The base's weights under its own names, in memory: ours without adapters and without a head that is the embedding.

    merged: a LoRA by adapted linear, which is added to its weight (W + scale B A, in float32 at least).
    """
    tied = frozenset(read.model.all_tied_weights_keys or {})
    if read.model.config.text_config.tie_word_embeddings:
        tied |= {name for name in source.names() if name.rpartition(".")[0].endswith("lm_head")}
    tensors: dict[str, LazyTensor] = {}
    for ours in source.names():
        theirs = base.name_of(ours)
        if ours in read.parameters or ours in tied or theirs is None:
            continue
        tensor = LazyTensor.from_source(source, ours)
        lora = (merged or {}).get(ours.removesuffix(".weight"))
        tensors[theirs] = tensor if lora is None else _folded(tensor, lora, rslora=read.settings.rslora)
    return LazySource(tensors)


def on_disk(base: AdapterBase, source: LazySource) -> LazySource:
    """A base's weights under the names that its folder has."""
    return LazySource({base.disk_name(name): tensor for name, tensor in source.tensors.items()})


def _folded(weight: LazyTensor, lora: MergedLoRA, *, rslora: bool) -> LazyTensor:
    rank = lora.A.shape[0]
    scale = lora.alpha / (rank**0.5 if rslora else rank)

    def read(start: int, stop: int) -> Tensor:
        w_OI = weight.read(start, stop)
        wide = torch.promote_types(w_OI.dtype, torch.float32)
        return torch.addmm(w_OI.to(wide), lora.B[start:stop].to(wide), lora.A.to(wide), alpha=scale).to(weight.dtype)

    return LazyTensor(shape=weight.shape, dtype=weight.dtype, read=read)
