"""InstructBLIP whose Q-Former may be a Q-MoE: for decoder-only and for encoder-decoder language models.

B batch   S sequence   I images   C channels   M features of an image   W their width   Q queries
L width of the language model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerModel,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.models.instructblip.modeling_instructblip import (
    BaseModelOutputWithVisionQformerOutputs,
    InstructBlipForConditionalGenerationModelOutput,
)
from transformers.utils import can_return_tuple

from moe_lvlm.adapters.attach import attach
from moe_lvlm.adapters.table import look_up
from moe_lvlm.connectors.connector import ConnectorInputs, query
from moe_lvlm.connectors.upcycle import upcycle_qformer
from moe_lvlm.models.connectors import blank_inputs, connector_inputs, connector_loss
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.images import blank_image
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.language_loss import Losses, Supervised, language_loss, sum_losses
from moe_lvlm.models.packed_attention import packed_inputs
from moe_lvlm.models.prompt_routing import PromptRoutingMixin, prompt_decisions
from moe_lvlm.models.tower import is_frozen
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site


@dataclass
class MoEInstructBlipOutput(InstructBlipForConditionalGenerationModelOutput):
    """InstructBLIP's output, and:

    loss: language_loss plus balance_loss. language_loss, balance_loss (the importance loss times its coefficient):
    scalars, None where there is none.
    routing: the trace of all routing decisions, if it was asked for.
    past_key_values, prompt_routing: what a call that goes on from this one takes over (`MoELlavaOutput`); of decoder-only
    language models.
    """

    language_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    routing: RoutingTrace | None = None
    past_key_values: Cache | None = None
    prompt_routing: dict[Site, RoutingDecision] | None = None


class MoEInstructBlipForConditionalGeneration(PromptRoutingMixin, InstructBlipForConditionalGeneration):
    """Vision model, Q-Former or Q-MoE, and a dense language model, which may hold adapters (`config.adapter`) if it is
    decoder-only; parameters have InstructBLIP's names.

    In training the parts run in the same order whatever a batch holds: without an image, on a blank one whose visual
    tokens are added times 0 and whose decisions count nowhere. Where features come from a cache, no batch runs the vision
    model.
    """

    config: MoEInstructBlipConfig
    config_class = MoEInstructBlipConfig
    main_input_name = "input_ids"
    qformer: InstructBlipQFormerModel

    def __init__(self, config: MoEInstructBlipConfig) -> None:
        super().__init__(config)
        if (settings := config.expert_settings) is not None:
            self.qformer = upcycle_qformer(self.qformer, settings)
        if (adapter := config.adapter_settings) is not None:
            attach(self.get_decoder(), adapter)

    def tie_weights(self, **kwargs: Any) -> None:
        """The language model's own ties; nothing else is tied."""
        super().tie_weights(**kwargs)
        self.language_model.tie_weights()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        routing: RoutingContext | None = None,
        output_routing: bool = False,
        num_items_in_batch: Tensor | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        instruction_mask: Tensor | None = None,
        cluster_ids: Tensor | None = None,
        dataset_ids: Tensor | None = None,
        prompt_routing: dict[Site, RoutingDecision] | None = None,
        sample_lengths: tuple[int, ...] | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEInstructBlipOutput:
        """One pass over [B, S] tokens.

        pixel_values: [I, C, H, W], images in the order of their marks. image_features: [I, M, W], the vision model's of
        the same images in their place, as `data.feature_cache` has them; with I = 0 for a batch without images.
        qformer_input_ids, qformer_attention_mask: [I, W],
        the words that the Q-Former reads beside each.
        labels: decoder-only [B, S]; encoder-decoder [B, answer], whose first column stands for the decoder's start; not
        shifted, -100 where there is no loss. decoder_input_ids: [B, answer], made of the labels if absent, or the start.
        routing: facts about the tokens, derived if absent. output_routing: give the trace back.
        num_items_in_batch: divisor of the summed token losses; None means the supervised tokens of this call.
        In training with labels a decoder-only model's head computes no columns without a loss, and `logits` are None.
        inputs_embeds: [B, S, L] of these input_ids, images in them, if they are there already. position_ids,
        past_key_values: of a decoder-only language model. instruction_mask, cluster_ids, dataset_ids, prompt_routing: as
        in `MoELlavaForConditionalGeneration.forward`, for gates of adapters. sample_lengths: as there, for a decoder-only
        language model.

        Raises:
            ValueError: no input_ids, images without words for the Q-Former, or both images and features.
        """
        if input_ids is None:
            raise ValueError("input_ids are needed: they say where the images stand")
        if image_features is not None and pixel_values is not None:
            raise ValueError("image_features go in the place of pixel_values; allowed: one of the two")
        arguments: dict[str, Any] = {}
        if sample_lengths is not None:
            attention_mask, arguments = packed_inputs(
                self.get_decoder().config,
                sample_lengths,
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                is_routed_blindly=self.config.is_routed and routing is None,
            )
        is_cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        if routing is None and self.config.is_routed:
            routing = derive_context(
                input_ids,
                attention_mask=attention_mask,
                image_token_id=self.config.image_token_id,
                num_images=self._count_images(input_ids, pixel_values, inputs_embeds, image_features),
                is_cached=is_cached,
                instruction_mask=instruction_mask,
                cluster_ids=cluster_ids,
                dataset_ids=dataset_ids,
                prompt=prompt_routing,
            )
        trace = self._open_trace(routing)
        if inputs_embeds is None:
            if is_cached:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                words = (qformer_input_ids, qformer_attention_mask)
                if image_features is not None:
                    inputs_embeds = self._embed_features(input_ids, image_features, *words, trace)
                else:
                    inputs_embeds = self._embed(input_ids, pixel_values, *words, trace)
        supervised = None
        if self.config.is_answer_apart:
            output = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                decoder_input_ids=self._decoder_inputs(decoder_input_ids, labels, input_ids),
                use_cache=use_cache,
                return_dict=True,
            )
        else:
            kept: int | Tensor = logits_to_keep
            if labels is not None and self.training:
                kept, supervised = Supervised.of(labels).columns(labels.shape[1])
            output = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=kept,
                return_dict=True,
                **arguments,
                **self._for_gates(trace),
            )
        logits, language = output.logits, None
        if supervised is not None:
            language = supervised.loss(supervised.select(logits), num_items_in_batch=num_items_in_batch)
            logits = None
        elif labels is not None:
            vocab_size = self.config.text_config.vocab_size
            language = language_loss(logits, labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch)
        losses = Losses() if language is None else sum_losses(language, connector_loss(trace, self.qformer))
        return MoEInstructBlipOutput(
            loss=losses.total,
            logits=logits,
            language_model_outputs=output,
            language_loss=losses.language,
            balance_loss=losses.balance,
            routing=trace if output_routing else None,
            past_key_values=output.past_key_values,
            prompt_routing=prompt_decisions(trace, is_cached=output.past_key_values is not None),
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        inputs: ConnectorInputs | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithVisionQformerOutputs:
        """pooler_output: visual tokens [I, Q, L]. inputs: in place of the words, with what Q-MoE needs in training.

        Raises:
            ValueError: neither words nor inputs.
        """
        if inputs is None:
            inputs = connector_inputs(
                qformer_input_ids, qformer_attention_mask, num_images=pixel_values.shape[0], trace=None
            )
        features = self.vision_model(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        ).last_hidden_state
        return BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=features, pooler_output=self._connect(features, inputs)
        )

    def train(self, mode: bool = True) -> MoEInstructBlipForConditionalGeneration:
        """As of any module; but a vision model of which nothing is trained stays as in evaluation (`MoELlavaModel`)."""
        super().train(mode)
        if is_frozen(self.vision_model):
            self.vision_model.eval()
        return self

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids as `generate` of the language model gives them: decoder-only [B, S + new], encoder-decoder
        [B, 1 + new], the start first. Arguments as in `forward`; kwargs are the language model's, and what gates of
        adapters ask about the prompt.

        Raises:
            ValueError: no input_ids, or images without words for the Q-Former.
        """
        if input_ids is None:
            raise ValueError("input_ids are needed: they say where the images stand")
        inputs_embeds = self._embed(input_ids, pixel_values, qformer_input_ids, qformer_attention_mask, None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        given = {} if self.config.is_answer_apart else {"input_ids": input_ids}
        if self.config.has_gated_adapter:
            # Each step comes by `forward`, which tells the gates what they ask.
            kwargs.setdefault("generation_config", self.language_model.generation_config)
            return GenerationMixin.generate(
                self, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **given, **kwargs
            )
        return self.language_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **given, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does it, with the ids of the prompt beside its embeddings."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("inputs_embeds") is not None:
            inputs["input_ids"] = input_ids
        return inputs

    def checkpointed_modules(self) -> Iterator[PreTrainedModel]:
        """What gradient checkpointing is for: the parts that gradients pass."""
        yield from (self.qformer, self.language_model)

    def language_layers(self) -> list[nn.ModuleList]:
        """The language model's layers; of an encoder-decoder one of the encoder and one of the decoder at a time."""
        if self.config.is_answer_apart:
            stacks = (self.language_model.encoder.block, self.language_model.decoder.block)
            return [nn.ModuleList(pair) for pair in zip(*stacks, strict=True)]
        return [nn.ModuleList([layer]) for layer in self.get_decoder().layers]

    def _count_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Tensor | None,
    ) -> int:
        if pixel_values is not None:
            return pixel_values.shape[0]
        if image_features is not None:
            return image_features.shape[0]
        if inputs_embeds is None:
            return 0
        return int((input_ids == self.config.image_token_id).sum()) // self.config.num_query_tokens

    def _open_trace(self, routing: RoutingContext | None) -> RoutingTrace | None:
        """None where nothing is routed: a plain Q-Former, and no gates of adapters."""
        if routing is None or not self.config.is_routed:
            return None
        return RoutingTrace(look_up(self.get_decoder(), routing) if self.config.has_gated_adapter else routing)

    def _for_gates(self, trace: RoutingTrace | None) -> dict[str, Any]:
        """What the language model's layers are told; one without gates takes no such arguments."""
        if trace is None or not self.config.has_gated_adapter:
            return {}
        return {"routing": trace.context, "routing_trace": trace}

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        qformer_input_ids: Tensor | None,
        qformer_attention_mask: Tensor | None,
        trace: RoutingTrace | None,
    ) -> Tensor:
        """[B, S, L]: words, and visual tokens where image tokens stand."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            if (input_ids == self.config.image_token_id).any():
                raise ValueError("input_ids hold image tokens, but no pixel_values came with them")
            if not self.training:
                return embeds
            blank = blank_image(self.config.vision_config, like=embeds)
            features = self.get_image_features(blank, inputs=blank_inputs(trace, embeds.device)).pooler_output
            return embeds + 0 * features.mean().to(embeds.dtype)
        inputs = connector_inputs(
            qformer_input_ids, qformer_attention_mask, num_images=pixel_values.shape[0], trace=trace
        )
        features = self.get_image_features(pixel_values, inputs=inputs).pooler_output
        return self._put_images(input_ids, embeds, features.to(embeds.dtype))

    def _embed_features(
        self,
        input_ids: Tensor,
        features_IMW: Tensor,
        qformer_input_ids: Tensor | None,
        qformer_attention_mask: Tensor | None,
        trace: RoutingTrace | None,
    ) -> Tensor:
        """The same with features in the place of images; the vision model is not called."""
        embeds = self.get_input_embeddings()(input_ids)
        num_images = features_IMW.shape[0]
        if not num_images:
            if not self.training:
                return embeds
            blank_1MW = features_IMW.new_zeros(1, *features_IMW.shape[1:])
            visual = self._connect(blank_1MW.to(embeds.dtype), blank_inputs(trace, embeds.device))
            return embeds + 0 * visual.mean().to(embeds.dtype)
        inputs = connector_inputs(qformer_input_ids, qformer_attention_mask, num_images=num_images, trace=trace)
        visual = self._connect(features_IMW.to(embeds.dtype), inputs)
        return self._put_images(input_ids, embeds, visual.to(embeds.dtype))

    def _connect(self, features_IMW: Tensor, inputs: ConnectorInputs) -> Tensor:
        """Visual tokens of features, [I, Q, L]."""
        queried = query(self.qformer, self.query_tokens, features_IMW, inputs)
        visual: Tensor = self.language_projection(queried)
        return visual

    def _put_images(self, input_ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        """Visual tokens [I, Q, L] where image tokens stand."""
        is_visual = (input_ids == self.config.image_token_id)[..., None]
        if int(is_visual.sum()) * embeds.shape[-1] != features.numel():
            raise ValueError(
                f"{int(is_visual.sum())} image tokens in input_ids for {features.shape[0]} images of "
                f"{features.shape[1]} visual tokens; each image needs as many"
            )
        return embeds.masked_scatter(is_visual, features)

    def _decoder_inputs(self, given: Tensor | None, labels: Tensor | None, input_ids: Tensor) -> Tensor:
        """What the decoder reads: the start, then the answer."""
        if given is not None:
            return given
        text = self.config.text_config
        if labels is None:
            return torch.full_like(input_ids[:, :1], text.decoder_start_token_id)
        ids = labels.masked_fill(labels == -100, text.pad_token_id)
        return torch.cat((torch.full_like(ids[:, :1], text.decoder_start_token_id), ids[:, 1:]), dim=1)
