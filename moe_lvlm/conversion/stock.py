"""Our model as an architecture of plain transformers: LLaVA around a stock mixture-of-experts language model.

Possible where routing is ordinary top-k and a stock class computes what the dense family computes. Weights keep the
names that transformers' own `save_pretrained` gives them on disk, one tensor a matrix of an expert.

D model width   F expert width   E experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.routing.eea import has_eea

ARCHITECTURE = "LlavaForConditionalGeneration"

# Fields that all families and all stock classes spell alike.
_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip
# Outside training these are top-k: `ltdr` without EEA; the losses of `task` and `stgc` belong to training.
_TOP_K_ROUTERS = ("top_k", "ltdr", "task", "stgc")
_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
# What our configuration has and LLaVA's has not, and what says nothing about the model
_OURS = (
    "moe", "language_head_bias", "qformer", "num_query_tokens", "experts", "adapter",
    "model_type", "auto_map", "architectures", "transformers_version",
)  # fmt: skip


class NoStockFormError(ValueError):
    """No stock architecture computes what this model computes; the message says what stands in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockForm:
    """What a model is in plain transformers.

    config: the whole configuration. language_model: the stock class of the language model. caveats: what a user must
    know beyond what its configuration says.
    """

    config: LlavaConfig
    language_model: str
    caveats: tuple[str, ...] = ()


def stock_form(config: MoELlavaConfig) -> StockForm:
    """The stock architecture that equals this model.

    Raises:
        NoStockFormError: there is none.
    """
    text, moe = config.text_config, config.moe_config
    if config.adapter is not None:
        raise NoStockFormError(
            f"adapter {config.adapter['kind']}: no stock class has adapters inside; `tools/export.py mocle` writes them for "
            "PEFT, or merged into the weights"
        )
    if config.language_head_bias:
        raise NoStockFormError(f"{text.model_type}: its language-model head has a bias, {ARCHITECTURE}'s has none")
    if moe is None:
        return StockForm(config=_llava_config(config, text), language_model=model_class_name(text))
    if has_eea(moe):
        raise NoStockFormError(
            "router ltdr with EEA: a vision tail token uses more experts than others, every stock class uses the same "
            "number for all; --without-eea exports the model with EEA switched off"
        )
    _check_routing(moe)
    _check_family(text)
    if text.model_type == "qwen3":
        stock = _qwen3_moe(text, moe)
    elif _fits_mixtral(text, moe):
        stock = _mixtral(text, moe)
    else:
        stock = _qwen2_moe(text, moe)
    caveats = [
        "In float32 it computes what the trained model computes. In bfloat16 and float16 the stock router multiplies "
        "in that type, the trained one in float32: where two experts nearly tie, another one may be chosen. Of exactly equal "
        "ones the trained model takes the first; PyTorch's topk, which the stock class uses, promises no order.",
    ]
    if isinstance(stock, Qwen2MoeConfig) and not moe.shared_experts:
        caveats.append(
            "The class always has a shared expert; here it has width 0 and adds 0. The warning about zero-element tensors "
            "that PyTorch gives when it loads is about that, and harmless."
        )
    if isinstance(stock, Qwen2MoeConfig) and "sliding_attention" in stock.layer_types:
        caveats.append(
            "Attention windows act under `sdpa` and `eager`; the stock class hands them to no flash-attention kernel."
        )
    return StockForm(
        config=_llava_config(config, stock), language_model=model_class_name(stock), caveats=tuple(caveats)
    )


def model_class_name(text: PreTrainedConfig) -> str:
    """The class of transformers that a language model's configuration belongs to."""
    return type(text).__name__.removesuffix("Config") + "Model"


def _llava_config(config: MoELlavaConfig, text: PreTrainedConfig) -> LlavaConfig:
    fields = config.to_dict()
    for ours in _OURS:
        fields.pop(ours, None)
    fields["text_config"] = text.to_dict()
    stock = LlavaConfig.from_dict(fields)
    stock.architectures = [ARCHITECTURE]
    return stock


def _check_routing(moe: MoEConfig) -> None:
    """NoStockFormError unless the router, once trained, is ordinary top-k over a linear gate that drops nothing."""
    if moe.router.kind not in _TOP_K_ROUTERS:
        raise NoStockFormError(
            f"router {moe.router.kind}: every stock class routes by plain top-k; allowed: {', '.join(_TOP_K_ROUTERS)}"
        )
    if moe.router.gate.kind != "linear":
        raise NoStockFormError(f"router gate {moe.router.gate.kind}: every stock class has a linear gate")
    if moe.capacity_factor is not None:
        raise NoStockFormError(
            f"capacity_factor {moe.capacity_factor}: no stock class drops tokens; train or load with "
            "moe.capacity_factor=null"
        )


def _check_family(text: PreTrainedConfig) -> None:
    """NoStockFormError unless attention, norms and FFN of the dense family are those of a stock class."""
    family = text.model_type
    if family not in _FAMILIES:
        raise NoStockFormError(
            f"language model {family!r}: no mixture-of-experts class of transformers has its attention and norms; "
            f"allowed: {', '.join(_FAMILIES)}"
        )
    if family != "qwen3" and getattr(text, "attention_bias", False):
        raise NoStockFormError(f"{family} with attention_bias: no stock class has a bias in all four projections")
    if getattr(text, "mlp_bias", False):
        raise NoStockFormError(f"{family} with mlp_bias: no stock class has experts with biases of this kind")
    rope = text.rope_parameters
    if family == "phi3" and (rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0):
        raise NoStockFormError(f"phi3 with rope parameters {rope}: stock classes rotate whole heads by one scale")


def _fits_mixtral(text: PreTrainedConfig, moe: MoEConfig) -> bool:
    every_layer = len(moe.layer_indices(text.num_hidden_layers)) == text.num_hidden_layers
    return text.model_type != "qwen2" and every_layer and _is_normalised(moe) and not moe.shared_experts


def _is_normalised(moe: MoEConfig) -> bool:
    """Whether the weights of the chosen experts sum to 1. With one expert, `probability` leaves its raw one."""
    is_raw_top1 = moe.top_k == 1 and moe.router.top1_weight == "probability"
    return moe.router.renormalize and not is_raw_top1


def _fields(text: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: getattr(text, name) for name in _SHARED_FIELDS}
    fields["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return fields


def _mixtral(text: PreTrainedConfig, moe: MoEConfig) -> MixtralConfig:
    return MixtralConfig(
        **_fields(text),
        intermediate_size=text.intermediate_size // moe.fine_grained,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        sliding_window=getattr(text, "sliding_window", None),
    )


def _sparse_fields(text: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
    sparse = set(moe.layer_indices(text.num_hidden_layers))
    return {
        "intermediate_size": text.intermediate_size,
        "moe_intermediate_size": text.intermediate_size // moe.fine_grained,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": _is_normalised(moe),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(text.num_hidden_layers) if layer not in sparse],
    }


def _qwen2_moe(text: PreTrainedConfig, moe: MoEConfig) -> Qwen2MoeConfig:
    window = getattr(text, "sliding_window", None)
    whole = "sliding_attention" if window is not None else "full_attention"
    layer_types = getattr(text, "layer_types", None) or [whole] * text.num_hidden_layers
    return Qwen2MoeConfig(
        **_fields(text),
        **_sparse_fields(text, moe),
        qkv_bias=text.model_type == "qwen2",
        # 0: the class computes a shared expert always, and one of no width gives 0
        shared_expert_intermediate_size=text.intermediate_size * moe.shared_experts,
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=list(layer_types),
    )


def _qwen3_moe(text: PreTrainedConfig, moe: MoEConfig) -> Qwen3MoeConfig:
    if moe.shared_experts:
        raise NoStockFormError("qwen3 with shared experts: Qwen3Moe has none, and no other stock class has its norms")
    kinds = set(text.layer_types)
    if len(kinds) > 1:
        raise NoStockFormError(f"qwen3 with layers of {sorted(kinds)}: Qwen3Moe has one kind of attention in all")
    is_sliding = kinds == {"sliding_attention"}
    return Qwen3MoeConfig(
        **_fields(text),
        **_sparse_fields(text, moe),
        attention_bias=text.attention_bias,
        use_sliding_window=is_sliding,
        sliding_window=text.sliding_window if is_sliding else None,
    )


def stock_source(config: MoELlavaConfig, form: StockForm, source: WeightSource) -> LazySource:
    """The model's weights under the names and in the shapes of its stock form.

    Raises:
        ValueError: the source has a weight that is not known here.
    """
    mapping = _Mapping(config, form, source)
    return LazySource({name: tensor for ours in source.names() for name, tensor in mapping.tensors_of(ours)})


class _Mapping:
    """From our names to those of one stock form."""

    def __init__(self, config: MoELlavaConfig, form: StockForm, source: WeightSource) -> None:
        self._text = config.text_config
        self._stock = form.config.text_config
        self._num_shared = 0 if config.moe_config is None else config.moe_config.shared_experts
        self._source = source
        self._last: tuple[tuple[str, int], Tensor] | None = None

    def tensors_of(self, ours: str) -> Iterator[tuple[str, LazyTensor]]:
        """Everything that is cut from one tensor of ours; several tensors of ours give one shared expert."""
        name = disk_name(ours)
        block, is_sparse, leaf = name.partition(".mlp.router.gate.")
        if is_sparse:
            yield f"{block}.{self._block}.gate.{leaf}", LazyTensor.from_source(self._source, ours)
            yield from self._shared_expert(f"{block}.{self._block}", ours.removesuffix("router.gate.weight"))
            return
        block, is_sparse, leaf = name.partition(".mlp.experts.")
        if is_sparse:
            yield from self._experts(f"{block}.{self._block}", ours, leaf)
        elif ".mlp.shared_experts." in name:
            return  # they come with their layer's router
        elif name.endswith(".qkv_proj.weight"):
            yield from self._attention(name, ours)
        elif name.endswith(".mlp.gate_up_proj.weight") and self._stock.model_type != self._text.model_type:
            half = self._source.shape(ours)[0] // 2
            for part, start in (("gate_proj", 0), ("up_proj", half)):
                yield name.replace("gate_up_proj", part), self._rows(ours, start, start + half)
        else:
            yield name, LazyTensor.from_source(self._source, ours)

    @property
    def _is_mixtral(self) -> bool:
        return bool(self._stock.model_type == "mixtral")

    @property
    def _block(self) -> str:
        return "block_sparse_moe" if self._is_mixtral else "mlp"

    def _experts(self, block: str, ours: str, leaf: str) -> Iterator[tuple[str, LazyTensor]]:
        names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        if leaf not in names:
            raise ValueError(f"{ours}: stock classes have no such expert weight; known: {', '.join(names)}")
        shape, dtype = self._source.shape(ours), self._source.dtype(ours)
        for expert in range(shape[0]):

            def read(start: int, stop: int, expert: int = expert) -> Tensor:
                return self._expert(ours, expert)[start:stop]

            theirs = leaf if self._is_mixtral else names[leaf]
            yield f"{block}.experts.{expert}.{theirs}.weight", LazyTensor(shape=shape[1:], dtype=dtype, read=read)

    def _expert(self, ours: str, expert: int) -> Tensor:
        """One matrix of one expert. The last one is kept: it is written a few rows at a time, but read once."""
        if self._last is None or self._last[0] != (ours, expert):
            self._last = None
            self._last = (ours, expert), self._source.read(ours, expert, expert + 1)[0]
        return self._last[1]

    def _rows(self, ours: str, start: int, stop: int) -> LazyTensor:
        shape, dtype = self._source.shape(ours), self._source.dtype(ours)
        return LazyTensor(
            shape=(stop - start, *shape[1:]),
            dtype=dtype,
            read=lambda first, last: self._source.read(ours, start + first, start + last),
        )

    def _attention(self, name: str, ours: str) -> Iterator[tuple[str, LazyTensor]]:
        if self._stock.model_type == self._text.model_type:
            yield name, LazyTensor.from_source(self._source, ours)
            return
        start = 0
        for part, heads in (
            ("q_proj", self._stock.num_attention_heads),
            ("k_proj", self._stock.num_key_value_heads),
            ("v_proj", self._stock.num_key_value_heads),
        ):
            stop = start + heads * self._stock.head_dim
            yield name.replace("qkv_proj", part), self._rows(ours, start, stop)
            start = stop

    def _shared_expert(self, block: str, ours: str) -> Iterator[tuple[str, LazyTensor]]:
        """Qwen2Moe's one shared expert: ours side by side. Its weight is a sigmoid, 1/2 at a gate of 0, so the last
        matrix is doubled, which is exact in floating point."""
        if self._stock.model_type != "qwen2_moe":
            return
        width, dtype = self._stock.hidden_size, self._source.dtype(f"{ours}experts.w1")
        layers = [f"{ours}shared_experts.{index}." for index in range(self._num_shared)]
        for part in ("gate_proj", "up_proj"):
            tensor = self._joined([self._ffn_rows(layer, part) for layer in layers], width, dtype)
            yield f"{block}.shared_expert.{part}.weight", tensor
        downs = [f"{layer}down_proj.weight" for layer in layers]

        def read_down(start: int, stop: int) -> Tensor:
            columns = [self._source.read(down, start, stop) for down in downs]
            return 2 * torch.cat(columns, dim=1) if columns else torch.empty(stop - start, 0, dtype=dtype)

        shape = (width, sum(self._source.shape(down)[1] for down in downs))
        yield f"{block}.shared_expert.down_proj.weight", LazyTensor(shape=shape, dtype=dtype, read=read_down)
        yield f"{block}.shared_expert_gate.weight", LazyTensor.of(torch.zeros(1, width, dtype=dtype))

    def _ffn_rows(self, layer: str, part: str) -> LazyTensor:
        fused = f"{layer}gate_up_proj.weight"
        if self._text.model_type != "phi3":
            return LazyTensor.from_source(self._source, f"{layer}{part}.weight")
        half = self._source.shape(fused)[0] // 2
        return self._rows(fused, 0, half) if part == "gate_proj" else self._rows(fused, half, 2 * half)

    def _joined(self, tensors: list[LazyTensor], width: int, dtype: torch.dtype) -> LazyTensor:
        """Tensors below each other."""

        def read(start: int, stop: int) -> Tensor:
            pieces, offset = [torch.empty(0, width, dtype=dtype)], 0
            for tensor in tensors:
                first, last = max(start - offset, 0), min(stop - offset, tensor.num_rows)
                if first < last:
                    pieces.append(tensor.read(first, last))
                offset += tensor.num_rows
            return torch.cat(pieces)

        return LazyTensor(shape=(sum(tensor.num_rows for tensor in tensors), width), dtype=dtype, read=read)


def disk_name(ours: str) -> str:
    """LLaVA's names on disk, as transformers writes them."""
    for prefix, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    raise ValueError(f"weight {ours!r}: belongs to none of language model, head, vision tower and projector")
