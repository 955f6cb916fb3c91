"""A tiny vision-language model with random weights, its tokenizer, and prompts of several lengths."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig
from moe_lvlm.models.upcycle import as_moe_llava, upcycle
from moe_lvlm.moe.upcycle import moe_layers

WORDS = ("what", "is", "it", "where", "how", "many", "cat", "dog", "one", "two", "left", "right", ":", "Q", "A", "?")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
NAMES = SPECIAL + WORDS
IMAGE_SIZE = 8
PATCH_SIZE = 4
IMAGE_TOKENS = 4
IMAGE_ID = SPECIAL.index("<image>")


@dataclass(frozen=True)
class TinyPrompt:
    """A prompt as generation wants it."""

    input_ids: Tensor
    pixel_values: Tensor | None
    cluster: int | None = None
    dataset_index: int | None = None
    connector_ids: Tensor | None = None

    @property
    def instruction(self) -> Tensor:
        """All words, as if the user had said everything."""
        return self.input_ids != IMAGE_ID


def greedy_by_hand(model: PreTrainedModel, prompt: TinyPrompt, *, steps: int, end_id: int) -> list[int]:
    """One prompt at a time, no padding, no cache, the whole sequence again for every token."""
    ids = prompt.input_ids.tolist()
    answer: list[int] = []
    with torch.inference_mode():
        for _ in range(steps):
            input_ids = torch.tensor([ids + answer])
            logits = model(input_ids=input_ids, pixel_values=prompt.pixel_values, use_cache=False).logits
            logits[..., IMAGE_ID] = -torch.inf  # an image mark is no answer
            token = int(logits[0, -1].argmax())
            if token == end_id:
                break
            answer.append(token)
    return answer


def write_run(folder: Path, model: PreTrainedModel, processor: LlavaProcessor, *, sets: dict[str, int]) -> Path:
    """A run's folder with the model. sets: name and max_new_tokens of evaluation sets, read from folder/data."""
    run = folder / "run"
    as_moe_llava(copy.deepcopy(model)).save_pretrained(run)
    processor.save_pretrained(run)
    tasks = [{"name": name, "path": f"{name}.json", "max_new_tokens": count} for name, count in sets.items()]
    recipe = {
        "name": "tiny",
        "model": {"from_pretrained": str(run)},
        "data": {"image_root": str(folder / "data"), "mixture": [{"path": "train.json"}]},
        "stages": [{"name": "tune", "train": ["connector"], "steps": 1, "learning_rate": 0.001}],
        "evaluation": {"tasks": tasks, "batch_size": 32},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=(
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Q : {{ message['content'] }}"
            "{% else %}A : {{ message['content'] }}{{ eos_token }}{% endif %} {% endfor %}"
            "{% if add_generation_prompt %}A :{% endif %}"
        ),
    )


@pytest.fixture(scope="session")
def config() -> LlavaConfig:
    # a wide initialisation: with a narrow one every prompt gets the same answer, and nothing could be told apart
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL + WORDS),
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, vision_feature_layer=-1)


@pytest.fixture(scope="session")
def dense_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def prompts() -> list[TinyPrompt]:
    """Seven prompts of 3 to 17 tokens; with no image, with one, and with two."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, num_images in ((3, 1), (9, 1), (4, 0), (5, 2), (2, 0), (6, 1), (8, 0)):
        words = torch.randint(len(SPECIAL), len(SPECIAL + WORDS), (length,), generator=generator)
        marks = torch.full((num_images * IMAGE_TOKENS,), IMAGE_ID)
        images = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) if num_images else None
        made.append(TinyPrompt(torch.cat([torch.tensor([1]), marks, words]), images))
    return made


@pytest.fixture(scope="session")
def moe_model(dense_model: LlavaForConditionalGeneration) -> PreTrainedModel:
    """LTDR routing over experts that differ from each other (freshly upcycled they are all alike)."""
    moe = MoEConfig(layers="dense", num_experts=4, top_k=1, router=LongTailRouterSettings(tail_k=3))
    model = upcycle(copy.deepcopy(dense_model), moe)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
