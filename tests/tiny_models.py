"""Tiny models with random weights, and batches for them: hidden size 32, images of 8 x 8 that give 4 visual tokens.

No parameter is at a special value (biases are not 0, norms not 1), so that a forgotten one shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    StableLmConfig,
    T5Config,
)

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.connectors.upcycle import experts_of, upcycle_qformer
from moe_lvlm.data.collator import pad_rows
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.types import RoutingContext

HIDDEN = 32
VOCABULARY = 64
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = 0, 1, 2, 60
IMAGE_SIZE = 8
IMAGE_TOKENS = 4

_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "initializer_range": 0.2,
}

# What each family's configuration takes beyond `_TEXT`. A short window makes Mistral's and Qwen2's masks differ by layer.
TEXT_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": lambda **fields: MistralConfig(**({"sliding_window": 5} | fields)),
    "qwen2": lambda **fields: Qwen2Config(
        **({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} | fields)
    ),
    "qwen3": lambda **fields: Qwen3Config(**({"head_dim": 8} | fields)),
    "phi": PhiConfig,
    "phi3": Phi3Config,
    "stablelm": StableLmConfig,
    "stablelm_parallel": lambda **fields: StableLmConfig(**({"use_parallel_residual": True} | fields)),
}

# name -> (configuration of the tower, feature_select that leaves the patches alone)
TOWERS: dict[str, tuple[Callable[..., PreTrainedConfig], str]] = {
    "clip": (lambda **fields: CLIPVisionConfig(intermediate_size=32, **fields), "default"),
    "siglip": (lambda **fields: SiglipVisionConfig(intermediate_size=32, **fields), "full"),
    "dinov2": (lambda **fields: Dinov2Config(mlp_ratio=2, **fields), "default"),
}


def tiny_text_config(family: str = "llama", **fields: Any) -> PreTrainedConfig:
    """Configuration of a tiny language model; `fields` go before the defaults."""
    return TEXT_CONFIGS[family](**(_TEXT | fields))


def tiny_llava_config(family: str = "llama", tower: str = "clip", **fields: Any) -> LlavaConfig:
    """Configuration of a tiny LLaVA; `fields` are the language model's."""
    make_tower, feature_select = TOWERS[tower]
    return LlavaConfig(
        vision_config=make_tower(**_VISION),
        text_config=tiny_text_config(family, **fields),
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy=feature_select,
    )


@cache
def _made_llava(
    family: str, tower: str, seed: int, fields: tuple[tuple[str, Any], ...]
) -> LlavaForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(tiny_llava_config(family, tower, **dict(fields)))
    shake(model, scale=0.1, seed=seed)
    model.generation_config.pad_token_id = PAD_ID
    return model.eval()


def tiny_llava(
    family: str = "llama", tower: str = "clip", *, seed: int = 0, **fields: Any
) -> LlavaForConditionalGeneration:
    """A dense LLaVA of transformers, in evaluation mode; each call gives a copy of its own."""
    return copy.deepcopy(_made_llava(family, tower, seed, tuple(sorted(fields.items()))))


def tiny_causal_lm(family: str = "llama", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A dense language model alone, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_text_config(family, **fields))
    shake(model, scale=0.1, seed=seed)
    return model.eval()


def tiny_moe_llava(
    config: MoEConfig, family: str = "llama", *, seed: int = 0, **fields: Any
) -> MoELlavaForConditionalGeneration:
    """A sparse LLaVA whose experts differ from each other and whose routers are sure of themselves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = upcycle(tiny_llava(family, seed=seed, **fields), config)
    assert isinstance(model, MoELlavaForConditionalGeneration)
    for index, (_, layer) in enumerate(moe_layers(model)):
        shake(layer.experts, scale=0.2, seed=seed + index)
        shake(layer.router, scale=0.5, seed=seed + index)
    return model


@torch.no_grad()
def shake(module: nn.Module, *, scale: float, seed: int) -> None:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@dataclass(frozen=True)
class TinySample:
    """One sample: images first, then words; the loss is on the last `num_answer` tokens."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None


def tiny_sample(num_images: int, num_words: int, *, num_answer: int = 2, seed: int = 0) -> TinySample:
    """A random sample of 1 + 4 x num_images + num_words tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, IMAGE_ID, (num_words,), generator=generator)
    input_ids = torch.cat((torch.tensor([BOS_ID]), torch.full((num_images * IMAGE_TOKENS,), IMAGE_ID), words))
    labels = input_ids.clone()
    labels[: len(labels) - num_answer] = -100
    pixel_values = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) if num_images else None
    return TinySample(input_ids, labels, pixel_values)


def tiny_samples() -> list[TinySample]:
    """Four samples of 7 to 14 tokens: with one image, none, two and one."""
    shapes = ((1, 5), (0, 6), (2, 5), (1, 3))
    return [tiny_sample(images, words, seed=index) for index, (images, words) in enumerate(shapes)]


def collate(samples: Sequence[TinySample], *, extra_padding: int = 0, side: str = "right") -> dict[str, Tensor]:
    """A batch for the model's forward; without any image `pixel_values` is absent."""
    length = max(len(sample.input_ids) for sample in samples) + extra_padding
    batch = {
        "input_ids": torch.full((len(samples), length), PAD_ID),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), -100),
    }
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        place = slice(0, size) if side == "right" else slice(length - size, length)
        batch["input_ids"][row, place] = sample.input_ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = sample.labels
    images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    return batch | ({"pixel_values": torch.cat(images)} if images else {})


def collate_with_facts(samples: Sequence[TinySample], *, side: str = "right") -> dict[str, Tensor]:
    """As `collate`, with what routers of whole samples want to know: the words before the answer are the instruction,
    and sample i is of cluster i mod 3."""
    batch = collate(samples, side=side)
    is_word = (batch["attention_mask"] == 1) & (batch["labels"] == -100) & (batch["input_ids"] != IMAGE_ID)
    return batch | {"instruction_mask": is_word.long(), "cluster_ids": torch.arange(len(samples)) % 3}


# The language models that InstructBLIP and BLIP-2 come with: Vicuna (LLaMA), OPT, Flan-T5.
BLIP_TEXT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": tiny_text_config,
    "opt": lambda: OPTConfig(
        hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, init_std=0.2, dropout=0.0,
        pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
    ),
    "t5": lambda: T5Config(
        d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        pad_token_id=PAD_ID, eos_token_id=EOS_ID, decoder_start_token_id=PAD_ID,
    ),
}  # fmt: skip
NUM_QUERIES = 3
NUM_WORDS = 20  # vocabulary of the Q-Former


def tiny_blip_config(text: str = "llama", *, num_layers: int = 4) -> InstructBlipConfig:
    """Configuration of a tiny InstructBLIP without dropout; 3 visual tokens an image."""
    return InstructBlipConfig(
        vision_config={"intermediate_size": 32, **_VISION},
        qformer_config={
            "hidden_size": 16, "num_hidden_layers": num_layers, "num_attention_heads": 2, "intermediate_size": 24,
            "vocab_size": NUM_WORDS, "max_position_embeddings": 16, "initializer_range": 0.2,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        text_config=BLIP_TEXT_CONFIGS[text](),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_ID,
    )  # fmt: skip


def tiny_blip(text: str = "llama", *, seed: int = 0) -> InstructBlipForConditionalGeneration:
    """An InstructBLIP of transformers, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(tiny_blip_config(text))
    shake(model, scale=0.1, seed=seed)
    shake(model.qformer.embeddings, scale=0.5, seed=seed)  # words that differ
    return model.eval()


def tiny_moe_blip(
    settings: ExpertSettings | None, text: str = "llama", *, seed: int = 0, is_upcycled: bool = False
) -> MoEInstructBlipForConditionalGeneration:
    """Ours around the same parameters, in evaluation mode. is_upcycled: experts stay copies of the query FFN; else they
    differ from each other, and routers are sure of themselves."""
    stock = tiny_blip(text, seed=seed)
    fields = stock.config.to_dict() | {"model_type": MoEInstructBlipConfig.model_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEInstructBlipForConditionalGeneration(MoEInstructBlipConfig.from_dict(fields))
        model.load_state_dict(stock.state_dict())
        if settings is not None:
            model.config.experts = settings.model_dump(mode="json")
            model.qformer = upcycle_qformer(model.qformer, settings)
    for index, (_, layer) in enumerate([] if is_upcycled else experts_of(model)):
        shake(layer.experts, scale=0.3, seed=seed + index)
        shake(layer.router, scale=2.0, seed=seed + index)
    return model.eval()


def blip_batch(text: str = "llama", *, num_samples: int = 4, seed: int = 0) -> dict[str, Any]:
    """Samples of one image and 2 to 5 words each with an answer of two tokens, and 1 to 4 words for the Q-Former."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows, answers, words = [], [], []
    for index in range(num_samples):
        prompt = torch.cat(
            (torch.full((NUM_QUERIES,), IMAGE_ID), torch.tensor([BOS_ID]), draw(3, IMAGE_ID, 2 + index % 4))
        )
        answer = draw(3, IMAGE_ID, 2)
        rows.append(prompt if text == "t5" else torch.cat((prompt, answer)))
        answers.append(
            torch.cat((torch.tensor([-100]), answer)) if text == "t5" else torch.cat((prompt * 0 - 100, answer))
        )
        words.append(torch.cat((torch.tensor([1]), draw(2, NUM_WORDS, index % 4))))
    input_ids, attention_mask = pad_rows(rows, PAD_ID)
    labels, _ = pad_rows(answers, -100)
    qformer_input_ids, qformer_attention_mask = pad_rows(words, 0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "qformer_input_ids": qformer_input_ids,
        "qformer_attention_mask": qformer_attention_mask,
        "routing": replace(
            derive_context(input_ids, attention_mask=attention_mask, image_token_id=IMAGE_ID, num_images=num_samples),
            draw_N=draw(0, 2**62, num_samples),
        ),
    }


def blip_rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Samples start <= i < stop of a batch, padding and all."""
    context: RoutingContext = batch["routing"]
    cut = {name: value[start:stop] for name, value in batch.items() if isinstance(value, Tensor)}
    assert context.draw_N is not None
    return cut | {
        "routing": replace(
            context,
            modality_BS=context.modality_BS[start:stop],
            image_BS=_shifted(context.image_BS[start:stop], start),
            sample_BS=_shifted(context.sample_BS[start:stop], start),
            num_samples=stop - start,
            draw_N=context.draw_N[start:stop],
        )
    }


def _shifted(index_BS: Tensor, start: int) -> Tensor:
    return torch.where(index_BS >= 0, index_BS - start, index_BS)
