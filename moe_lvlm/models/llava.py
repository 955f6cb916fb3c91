"""The vision-language model: transformers' LLaVA whose language model may hold a mixture of experts.

B batch   S sequence   D model width   I images   C channels   M features of an image   W their width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    InstructBlipQFormerModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaPreTrainedModel
from transformers.utils import can_return_tuple

from moe_lvlm.adapters.attach import attach
from moe_lvlm.adapters.table import look_up
from moe_lvlm.connectors.connector import ConnectorInputs, QFormerConnector
from moe_lvlm.connectors.upcycle import upcycle_qformer
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.connectors import blank_inputs, connector_inputs, connector_loss
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.images import blank_image
from moe_lvlm.models.language_loss import Losses, Supervised, language_loss, sum_losses
from moe_lvlm.models.packed_attention import packed_inputs
from moe_lvlm.models.prompt_routing import PromptRoutingMixin, prompt_decisions
from moe_lvlm.models.tower import is_frozen
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.upcycle import upcycle_decoder
from moe_lvlm.routing.gates import Gate
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site

# Which of the tower's features are used, where it is not as the configuration says.
_FEATURE_KEYS = ("vision_feature_layer", "vision_feature_select_strategy")


@dataclass
class MoELlavaOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output, and:

    loss: language_loss plus balance_loss. language_loss, balance_loss (all auxiliary losses of routers, the connector's
    among them): scalars, None where there is none.
    routing: the trace of all routing decisions, if it was asked for.
    prompt_routing: decisions for whole samples, which a call that goes on from this one's cache takes over; None where
    there are none.
    """

    language_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    routing: RoutingTrace | None = None
    prompt_routing: dict[Site, RoutingDecision] | None = None


class MoELlavaModel(LlavaModel):
    """LLaVA without the head. In training its parts run in the same order whatever the batch holds.

    connector: a Q-Former between the tower's features and the language model, in the place of LLaVA's projector; None
    where there is the projector.
    """

    config: MoELlavaConfig

    def __init__(self, config: MoELlavaConfig) -> None:
        super().__init__(config)
        self.connector: QFormerConnector | None = None
        if (qformer_config := config.qformer_config) is not None:
            qformer_config.encoder_hidden_size = config.vision_config.hidden_size
            qformer = InstructBlipQFormerModel._from_config(qformer_config)
            if (settings := config.expert_settings) is not None:
                qformer = upcycle_qformer(qformer, settings)
            # What LLaVA's code does with a projector leaves the features as they are.
            self.multi_modal_projector = nn.Identity()
            self.connector = QFormerConnector(
                qformer, num_queries=config.num_query_tokens, language_width=config.text_config.hidden_size
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        routing_trace: RoutingTrace | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LlavaModel.forward. In training, a batch without an image runs the tower and the connector on a blank
        one and adds it times 0: ranks whose batches differ in this must call the same modules in the same order, or
        ZeRO's buckets and gathers no longer match, and the language model's input must need a gradient on all.

        image_features: [I, M, W], what the tower makes of the images, in place of pixel_values. The tower is not called
        then, on no rank: without an image I is 0, and the connector alone runs on a blank one."""
        if image_features is not None:
            if input_ids is None or pixel_values is not None:
                raise ValueError("image_features go with input_ids, and in the place of pixel_values")
            inputs_embeds = self._embed_features(
                input_ids, image_features, qformer_input_ids, qformer_attention_mask, routing_trace
            )
            input_ids = None
        if pixel_values is not None and self.connector is not None:
            inputs = connector_inputs(
                qformer_input_ids, qformer_attention_mask, num_images=pixel_values.shape[0], trace=routing_trace
            )
            layers = {name: kwargs[name] for name in _FEATURE_KEYS if name in kwargs}
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, inputs=inputs, **layers)}
            pixel_values = None
        has_images = pixel_values is not None or bool(mm_encoder_outputs)
        if self.training and not has_images and input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            blank = self.get_image_features(
                blank_image(self.config.vision_config, like=inputs_embeds),
                inputs=blank_inputs(routing_trace, inputs_embeds.device),
            )
            inputs_embeds = inputs_embeds + 0 * torch.cat(blank.pooler_output, dim=0).mean().to(inputs_embeds.dtype)
            input_ids = None
        if routing_trace is not None:
            kwargs["routing_trace"] = routing_trace
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def train(self, mode: bool = True) -> MoELlavaModel:
        """As of any module; but a tower of which nothing is trained stays as in evaluation, without dropout, so that its
        features are those that a cache holds."""
        super().train(mode)
        if is_frozen(self.vision_tower):
            self.vision_tower.eval()
        return self

    def _embed_features(
        self,
        input_ids: Tensor,
        features_IMW: Tensor,
        qformer_input_ids: Tensor | None,
        qformer_attention_mask: Tensor | None,
        trace: RoutingTrace | None,
    ) -> Tensor:
        """[B, S, D]: words, and visual tokens where image tokens stand. Embeddings come first: they tell the type."""
        embeds_BSD = self.get_input_embeddings()(input_ids)
        num_images = features_IMW.shape[0]
        if not num_images:
            if not self.training:
                return embeds_BSD
            blank_1MW = features_IMW.new_zeros(1, *features_IMW.shape[1:])
            visual = self._connect(blank_1MW.to(embeds_BSD.dtype), blank_inputs(trace, embeds_BSD.device))
            return embeds_BSD + 0 * visual.mean().to(embeds_BSD.dtype)
        inputs = None
        if self.connector is not None:
            inputs = connector_inputs(qformer_input_ids, qformer_attention_mask, num_images=num_images, trace=trace)
        visual = self._connect(features_IMW.to(embeds_BSD.dtype), inputs).to(embeds_BSD.dtype)
        is_visual = self.get_placeholder_mask(input_ids, inputs_embeds=embeds_BSD, image_features=visual)
        return embeds_BSD.masked_scatter(is_visual, visual)

    def _connect(self, features_IMW: Tensor, inputs: ConnectorInputs | None) -> Tensor:
        """Visual tokens of features, [I, tokens, D]."""
        visual: Tensor = self.multi_modal_projector(features_IMW)
        if self.connector is None:
            return visual
        assert inputs is not None
        return self.connector(visual, inputs)

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        inputs: ConnectorInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """The tower's output, with each image's visual tokens as `pooler_output`, a list of [tokens, D].

        A Q-Former connector reads `inputs`, or the words alone; `generate` hands in the latter by their names.

        Raises:
            ValueError: a Q-Former without words.
        """
        output = super().get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **kwargs | {"return_dict": True},
        )
        if self.connector is not None:
            if inputs is None:
                inputs = connector_inputs(
                    qformer_input_ids, qformer_attention_mask, num_images=pixel_values.shape[0], trace=None
                )
            output.pooler_output = list(self.connector(torch.stack(output.pooler_output), inputs))
        return output


class MoELlavaForConditionalGeneration(PromptRoutingMixin, LlavaForConditionalGeneration):
    """Vision tower, projector, and a language model whose FFNs may be mixtures of experts (`config.moe`), and that may
    hold adapters (`config.adapter`).

    The routing context is an explicit argument; without one it is derived from input_ids and attention_mask, so that
    `generate()` needs nothing of ours. Each call has a trace of its own; losses are computed from it.
    """

    config: MoELlavaConfig
    config_class = MoELlavaConfig

    def __init__(self, config: MoELlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MoELlavaModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.language_head_bias)
        if (moe := config.moe_config) is not None:
            upcycle_decoder(self.model.language_model, moe)
        if (adapter := config.adapter_settings) is not None:
            attach(self.model.language_model, adapter)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Gates and experts initialise themselves, the way their settings say.
        if not isinstance(module, Gate | Experts):
            super()._init_weights(module)

    def take_parts(self, *, tower: nn.Module, language_model: nn.Module, head: nn.Module) -> None:
        """Put these parts in the place of its own, and their configurations into its configuration."""
        self.model.vision_tower = tower
        self.model.language_model = language_model
        self.lm_head = head  # type: ignore[assignment]  # a linear layer, with or without a bias
        self.config.vision_config = tower.config
        self.config.text_config = language_model.config

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        routing: RoutingContext | None = None,
        output_routing: bool = False,
        instruction_mask: Tensor | None = None,
        cluster_ids: Tensor | None = None,
        dataset_ids: Tensor | None = None,
        prompt_routing: dict[Site, RoutingDecision] | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        sample_lengths: tuple[int, ...] | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MoELlavaOutput:
        """One pass over [B, S] tokens.

        pixel_values: [I, C, H, W], images in the order of their marks. image_features: [I, M, W], the tower's of the same
        images in their place, as `data.feature_cache` has them; with I = 0 for a batch without images.
        labels: [B, S], -100 where there is no loss.
        routing: facts about the tokens, derived if absent. output_routing: give the trace back.
        instruction_mask: [B, S of the prompt], 1 at the user's words, cluster_ids and dataset_ids: [B], for routers and
        gates that want to know, where no `routing` is given. prompt_routing: of an earlier call from whose cache this one goes on.
        qformer_input_ids, qformer_attention_mask: [I, words], what a Q-Former connector reads beside each image.
        num_items_in_batch: divisor of the summed token losses; None means the supervised tokens of this call.
        In training with labels the language head computes the supervised positions alone, and `logits` are None.
        sample_lengths: of a packed row [1, S], the tokens of each of its samples (`packed_inputs`).

        Raises:
            ValueError: a sparse model got inputs_embeds without a routing context, or a Q-Former images without words.
        """
        # A model without experts routes nothing.
        is_routed = self.config.is_routed
        if sample_lengths is not None:
            attention_mask, arguments = packed_inputs(
                self.model.language_model.config,
                sample_lengths,
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                is_routed_blindly=is_routed and routing is None,
            )
            kwargs |= arguments
        if routing is None and is_routed:
            if input_ids is None:
                raise ValueError("a sparse model needs input_ids, or a routing context beside inputs_embeds")
            routing = derive_context(
                input_ids,
                attention_mask=attention_mask,
                image_token_id=self.config.image_token_id,
                num_images=_count_images(pixel_values, mm_encoder_outputs, image_features),
                is_cached=past_key_values is not None and past_key_values.get_seq_length() > 0,
                instruction_mask=instruction_mask,
                cluster_ids=cluster_ids,
                dataset_ids=dataset_ids,
                prompt=prompt_routing,
            )
        trace = RoutingTrace(look_up(self.model.language_model, routing)) if routing is not None and is_routed else None
        if trace is not None:
            kwargs |= {"routing": trace.context, "routing_trace": trace}
        if self.config.qformer is not None:
            kwargs |= {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        if image_features is not None:
            kwargs["image_features"] = image_features
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_BSD, logits, language = output.last_hidden_state, None, None
        if labels is not None and self.training:
            supervised = Supervised.of(labels)
            logits_nV = self.lm_head(supervised.select(hidden_BSD))
            language = supervised.loss(logits_nV, num_items_in_batch=num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BSD[:, kept])
            if labels is not None:
                vocab_size = self.config.text_config.vocab_size
                language = language_loss(logits, labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch)
        losses = Losses() if language is None else sum_losses(language, self._balance_loss(trace))
        return MoELlavaOutput(
            loss=losses.total,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
            language_loss=losses.language,
            balance_loss=losses.balance,
            routing=trace if output_routing else None,
            prompt_routing=prompt_decisions(trace, is_cached=output.past_key_values is not None),
        )

    def checkpointed_modules(self) -> Iterator[PreTrainedModel]:
        """What gradient checkpointing is for: the parts that gradients pass."""
        if self.model.connector is not None:
            yield self.model.connector.qformer
        yield self.model.language_model

    def language_layers(self) -> list[nn.ModuleList]:
        """The language model's layers, each the module that it is."""
        return [nn.ModuleList([layer]) for layer in self.model.language_model.layers]

    def _balance_loss(self, trace: RoutingTrace | None) -> Tensor | None:
        """All auxiliary losses, each times its coefficient; None where nothing is routed."""
        if trace is None:
            return None
        losses = []
        if (moe := self.config.moe_config) is not None:
            losses.append(auxiliary_loss(trace, moe))
        if self.model.connector is not None:
            losses.append(connector_loss(trace, self.model.connector.qformer))
        found = [loss for loss in losses if loss is not None]
        return torch.stack([loss.to(found[0].device) for loss in found]).sum() if found else None


def _count_images(
    pixel_values: Tensor | None, mm_encoder_outputs: dict[str, Any] | None, image_features: Tensor | None
) -> int:
    if pixel_values is not None:
        return pixel_values.shape[0]
    if image_features is not None:
        return image_features.shape[0]
    if mm_encoder_outputs is not None and (image := mm_encoder_outputs.get("image")) is not None:
        return len(image.pooler_output)
    return 0


AutoModelForImageTextToText.register(MoELlavaConfig, MoELlavaForConditionalGeneration, exist_ok=True)
