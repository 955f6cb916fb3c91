"""The parts of a model as they run on fake tensors: what each is given, and what it gives back.

B rows   S positions of a row   I images   P positions of an image in the tower   W words   V vocabulary   D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_lvlm.connectors.connector import ConnectorInputs, QFormerConnector
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL, RoutingContext

TOWER, CONNECTOR, HEAD = "tower", "connector", "head"
NUM_WORDS = 32
"""Words that a Q-Former reads beside an image: a guess, of little weight."""

VLM = MoELlavaForConditionalGeneration | MoEInstructBlipForConditionalGeneration


def check_model(model: nn.Module) -> VLM:
    """The model itself.

    Raises:
        ValueError: it is none of ours.
    """
    if not isinstance(model, MoELlavaForConditionalGeneration | MoEInstructBlipForConditionalGeneration):
        allowed = "MoELlavaForConditionalGeneration, MoEInstructBlipForConditionalGeneration"
        raise ValueError(f"{type(model).__name__}: not a model of this project; allowed: {allowed}")
    return model


def language_decoder(model: VLM) -> Any:
    """The decoder-only language model without its head."""
    return model.model.language_model if isinstance(model, MoELlavaForConditionalGeneration) else model.get_decoder()


class Part(NamedTuple):
    """A part of a model. module: what holds its parameters. run: the part of a twin of that module. sequence: positions of
    a row in it. is_unmasked: attention is fused and needs no mask, since nothing is padded."""

    name: str
    module: nn.Module
    run: Callable[[Any], Tensor]
    sequence: int
    is_unmasked: bool = False


def attend_unmasked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention by transformers' interface that keeps what fused attention over packed rows keeps: query, key, value, output
    and one number a query and head. It sees a packed row as one sample."""
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **_without(kwargs, "is_causal"))


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


UNMASKED = "estimated_without_mask"
"""The name under which transformers finds it; it makes masks for names that have a kind of mask only."""
AttentionInterface.register(UNMASKED, attend_unmasked)


def tower_part(model: VLM, shape: BatchShape, dtype: torch.dtype) -> Part:
    """[I, P, width of the tower]. It runs to its last layer, whichever is read."""
    tower = model.model.vision_tower if isinstance(model, MoELlavaForConditionalGeneration) else model.vision_model
    config = model.config.vision_config
    size = (getattr(config, "num_channels", 3), *image_size(config))

    def run(twin: Any) -> Tensor:
        pixels = torch.empty(shape.num_images, *size, dtype=dtype)
        features: Tensor = twin(pixel_values=pixels).last_hidden_state
        return features

    return Part(TOWER, tower, run, sequence=0)


def connector_part(model: VLM, features: Tensor, *, needs_grad: bool) -> Part:
    """[I, visual tokens, D] out of a tower's features."""
    shape: tuple[int, ...] = tuple(features.shape)
    if isinstance(model, MoELlavaForConditionalGeneration):
        drops_class = model.config.vision_feature_select_strategy == "default"
        shape = (shape[0], shape[1] - drops_class, shape[2])
        module = model.model.multi_modal_projector if model.model.connector is None else model.model.connector
    else:
        module = _blip_connector(model)

    def run(twin: Any) -> Tensor:
        given = torch.empty(shape, dtype=features.dtype, requires_grad=needs_grad)
        if not isinstance(twin, QFormerConnector):
            projected: Tensor = twin(given)
            return projected
        num_words = min(NUM_WORDS, twin.qformer.config.max_position_embeddings)
        words = torch.empty(shape[0], num_words, dtype=torch.int64)
        draws = torch.empty(shape[0], dtype=torch.int64)
        return twin(given, ConnectorInputs(input_ids=words, draw_I=draws))

    return Part(CONNECTOR, module, run, sequence=0)


def _blip_connector(model: MoEInstructBlipForConditionalGeneration) -> QFormerConnector:
    """InstructBLIP's connector, which is no module of its own there, with the model's own parameters."""
    with torch.device("meta"):
        connector = QFormerConnector.__new__(QFormerConnector)
        nn.Module.__init__(connector)
    connector.query_tokens = model.query_tokens
    connector.qformer = model.qformer
    connector.language_projection = model.language_projection
    return connector


def language_part(model: VLM, shape: BatchShape, dtype: torch.dtype, *, needs_grad: bool) -> Part:
    """The last hidden states [B, S, D], or those of an encoder-decoder's answers."""
    D = model.get_input_embeddings().weight.shape[1]
    size = (shape.rows, shape.width)
    is_padded = shape.padded_to is not None and min(shape.sample_lengths) < shape.width

    def given() -> dict[str, Any]:
        embeds = torch.empty(*size, D, dtype=dtype, requires_grad=needs_grad)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(size, dtype=torch.int64) if is_padded else None}

    if model.config.is_answer_apart:
        return Part(LANGUAGE_MODEL, model.language_model, lambda twin: _run_twice(twin, given(), shape), shape.width)

    def run(twin: Any) -> Tensor:
        context = blank_context(shape)
        routed = {"routing": context, "routing_trace": RoutingTrace(context)} if model.config.is_routed else {}
        hidden: Tensor = twin(use_cache=False, **given(), **routed).last_hidden_state
        return hidden

    decoder = language_decoder(model)
    is_unmasked = not is_padded and decoder.config._attn_implementation != "eager"
    return Part(LANGUAGE_MODEL, decoder, run, shape.width, is_unmasked)


def _run_twice(twin: Any, given: dict[str, Any], shape: BatchShape) -> Tensor:
    """An encoder-decoder: the questions, then the answers, each as long as the mean of them."""
    read = twin.encoder(**given).last_hidden_state
    rows = len(shape.sample_lengths)
    answers = torch.empty(rows, answer_length(shape), dtype=torch.int64)
    hidden: Tensor = twin.decoder(
        input_ids=answers,
        encoder_hidden_states=read,
        encoder_attention_mask=given["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    return hidden


def answer_length(shape: BatchShape) -> int:
    """Positions of each answer of an encoder-decoder, the start before it included."""
    return -(-shape.supervised // len(shape.sample_lengths)) + 1


def head_part(model: VLM, num_positions: int, dtype: torch.dtype, *, needs_grad: bool) -> Part:
    """The loss of so many positions, whose logits are made and, in float32, normalised."""
    head = model.get_output_embeddings()
    D = head.weight.shape[1]

    def run(twin: Any) -> Tensor:
        hidden = torch.empty(num_positions, D, dtype=dtype, requires_grad=needs_grad)
        labels = torch.empty(num_positions, dtype=torch.int64)
        return nn.functional.cross_entropy(twin(hidden).float(), labels, reduction="sum")

    return Part(HEAD, head, run, sequence=0)


def blank_context(shape: BatchShape) -> RoutingContext:
    """Facts about tokens, of the right shapes."""
    size, num_samples = (shape.rows, shape.width), len(shape.sample_lengths)
    per_sample = torch.empty(num_samples, dtype=torch.int64)
    return RoutingContext(
        modality_BS=torch.empty(size, dtype=torch.int8),
        image_BS=torch.empty(size, dtype=torch.int32),
        sample_BS=torch.empty(size, dtype=torch.int32),
        num_samples=num_samples,
        instruction_BS=torch.empty(size, dtype=torch.bool),
        task_N=per_sample,
        cluster_N=per_sample,
        dataset_N=per_sample,
        draw_N=per_sample,
        is_packed=shape.padded_to is None,
    )
