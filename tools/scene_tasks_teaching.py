"""Teach the parts of the pack scene_tasks: a tower, two language models, and for each a Q-Former between them.

They stand for what an InstructBLIP checkpoint has before it is tuned on instructions: a pretrained tower, a pretrained
language model, and a Q-Former trained on pictures and the texts beside them.
B rows, S sequence, Q queries, D width of the language model, P patches
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from scene_tasks_records import (
    Caption,
    Kind,
    all_told,
    choice_questions,
    draw,
    object_captions,
    open_questions,
    sign_captions,
    web_captions,
)
from scene_tasks_text import Exercise, Tokenizers, tokens_of, training_batch
from scene_tasks_truths import Truth, draw_truth
from scenes_teaching import BATCH, PATCH, WIDTH, PatchClasses, Teacher, teach_patches
from torch import Tensor
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moe_lvlm.config.instructions import QMOE_SETS
from moe_lvlm.data.scenes import SIDE

NUM_QUERIES = 8
QFORMER_LAYERS = 6
QFORMER_WIDTH = 96
LANGUAGE_LEARNING_RATE = {"llama": 4e-3, "t5": 2e-3}
QFORMER_LEARNING_RATE = 1e-3
# of the spread of embeddings: what is told to a language model in place of a picture is never quite clear
NOISE = 0.3
CAPTION_SHARE = 0.5
LITTLE_TOLD_SHARE = 0.3


class Lesson(NamedTuple):
    """told: phrases in place of a picture."""

    told: Sequence[str]
    exercise: Exercise


def teach_tower(images: Tensor, labels: Tensor, *, num_classes: int, steps: int, seed: int) -> InstructBlipVisionModel:
    """A ViT that knows of each patch what it shows and where it lies.

    images: float32 [B, 3, SIDE, SIDE] in -1..1. labels: int64 [B, P], a class for each patch in reading order.
    """
    torch.manual_seed(seed)
    tower = InstructBlipVisionModel(
        InstructBlipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.02,
        )
    )
    num_patches = labels.shape[1]
    places = torch.arange(num_patches).expand(labels.shape)
    lessons = [PatchClasses("content", labels, num_classes), PatchClasses("place", places, num_patches)]
    teach_patches(tower, _patch_states, images, lessons, steps=steps)
    return tower.eval()


def _patch_states(tower: InstructBlipVisionModel, images: Tensor) -> Tensor:
    """What a Q-Former reads, without the class token."""
    hidden: Tensor = tower(images).last_hidden_state
    return hidden[:, 1:]


def language_config(kind: str, tokenizers: Tokenizers) -> LlamaConfig | T5Config:
    """kind: llama or t5."""
    tokenizer = tokenizers.language_model
    # the image token's embedding is a row like any other
    size = (len(tokenizer) + 7) // 8 * 8
    if kind == "llama":
        return LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=size,
            max_position_embeddings=256,
            # small models learn to copy far sooner from wide weights
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return T5Config(
        d_model=WIDTH,
        d_kv=24,
        num_heads=4,
        d_ff=128,
        num_layers=3,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        vocab_size=size,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def teach_language_model(kind: str, tokenizers: Tokenizers, *, steps: int, seed: int) -> PreTrainedModel:
    """Teach a Llama or T5 to answer and to caption from what it is told in place of a picture.

    A phrase is one embedding, the sum of its words', at one of NUM_QUERIES places: as much as a Q-Former can say.
    """
    torch.manual_seed(seed)
    config = language_config(kind, tokenizers)
    model = LlamaForCausalLM(config) if kind == "llama" else T5ForConditionalGeneration(config)
    rng = np.random.default_rng([seed, 2])
    teacher = Teacher(model.parameters(), steps, learning_rate=LANGUAGE_LEARNING_RATE[kind])
    for _ in track(range(steps), description=f"teaching the {kind}"):
        lessons = [draw_lesson(rng) for _ in range(BATCH)]
        batch = training_batch([lesson.exercise for lesson in lessons], tokenizers, num_queries=NUM_QUERIES)
        embeds_BSD = model.get_input_embeddings()(batch["input_ids"])
        told_BQD = tell(model, [lesson.told for lesson in lessons], tokenizers, rng)
        told_BQD = told_BQD + NOISE * embeds_BSD.detach().std() * torch.randn(told_BQD.shape)
        embeds_BSD = torch.cat([told_BQD, embeds_BSD[:, NUM_QUERIES:]], dim=1)
        out = model(inputs_embeds=embeds_BSD, attention_mask=batch["attention_mask"], labels=batch["labels"])
        teacher.step(out.loss)
    print(f"{kind}: loss {teacher.last_loss:.4f}")
    return model.eval()


def tell(
    model: PreTrainedModel, told: Sequence[Sequence[str]], tokenizers: Tokenizers, rng: np.random.Generator
) -> Tensor:
    """Phrases at random places among NUM_QUERIES, the other places zero: float32 [B, Q, D]."""
    rows, queries, ids = [], [], []
    for row, phrases in enumerate(told):
        places = rng.permutation(NUM_QUERIES)
        for place, words in zip(places, tokens_of(phrases, tokenizers), strict=False):
            rows += [row] * len(words)
            queries += [int(place)] * len(words)
            ids += words
    weights: Tensor = model.get_input_embeddings().weight
    blank = torch.zeros(len(told), NUM_QUERIES, weights.shape[1])
    return blank.index_put((torch.tensor(rows), torch.tensor(queries)), weights[torch.tensor(ids)], accumulate=True)


def draw_lesson(rng: np.random.Generator) -> Lesson:
    """Of a scene that need not be among the pictures: a caption of what is told, or a question about it."""
    truth = draw_truth(rng)
    if rng.random() < CAPTION_SHARE:
        sorts = [web_captions(truth), object_captions(truth) if truth.sign is None else sign_captions(truth)]
        caption: Caption = draw(sorts[rng.integers(len(sorts))], rng)
        return Lesson(caption.told, captioning(caption.text, rng))
    has_choices = rng.random() < 0.5
    asked = draw(choice_questions(truth) if has_choices else open_questions(truth), rng)
    instruction = draw(QMOE_SETS["choice" if has_choices else "vqa"], rng).format(
        QUESTION=asked.question, CANDIDATES=", ".join(asked.choices(rng)) if has_choices else None
    )
    told = all_told(truth)
    if rng.random() < LITTLE_TOLD_SHARE:
        told = _needed(asked.kind, asked.question, told)
    return Lesson(told, Exercise(asked.question, instruction, asked.answer))


def _needed(kind: Kind, question: str, told: Sequence[str]) -> list[str]:
    """Of all phrases those that the answer follows from."""
    if kind is Kind.BACKGROUND:
        return [phrase for phrase in told if phrase.endswith("background")]
    objects = [phrase for phrase in told if not phrase.startswith("word") and not phrase.endswith("background")]
    if kind is Kind.WHAT:
        return [phrase for phrase in objects if question.endswith(f"{phrase.split(maxsplit=1)[1]}?")]
    if kind is Kind.WHERE:
        return [phrase for phrase in objects if question.endswith(f"{phrase.split()[0]}?")]
    return objects


def captioning(text: str, rng: np.random.Generator) -> Exercise:
    """A caption under one of the instructions, which is also what the Q-Former reads."""
    instruction = draw(QMOE_SETS["caption"], rng)
    return Exercise(instruction, instruction, text)


def assemble(
    tower: InstructBlipVisionModel, language_model: PreTrainedModel, tokenizers: Tokenizers, *, seed: int
) -> InstructBlipForConditionalGeneration:
    """The two parts with a new Q-Former between them."""
    torch.manual_seed(seed)
    qformer = InstructBlipQFormerConfig(
        vocab_size=language_model.config.vocab_size,
        hidden_size=QFORMER_WIDTH,
        num_hidden_layers=QFORMER_LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * QFORMER_WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=128,
        pad_token_id=tokenizers.qformer.pad_token_id,
    )
    config = InstructBlipConfig(
        vision_config=tower.config.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=language_model.config.to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=tokenizers.language_model.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    # transformers starts them at zero, where all queries would stay the same one
    torch.nn.init.normal_(model.query_tokens, std=0.02)
    return model


def freeze_all_but_connector(model: InstructBlipForConditionalGeneration) -> list[torch.nn.Parameter]:
    """The query tokens, the Q-Former and the projection to the language model."""
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    return [weight for weight in model.parameters() if weight.requires_grad]


def teach_qformer(
    model: InstructBlipForConditionalGeneration,
    images: Tensor,
    truths: Sequence[Truth],
    tokenizers: Tokenizers,
    *,
    steps: int,
    seed: int,
) -> None:
    """Teach query tokens, Q-Former and projection to caption the pictures, with tower and language model frozen.

    images: float32 [B, 3, SIDE, SIDE] in -1..1.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    teacher = Teacher(freeze_all_but_connector(model), steps, learning_rate=QFORMER_LEARNING_RATE)
    for _ in track(range(steps), description="teaching the Q-Former"):
        chosen = rng.integers(len(truths), size=BATCH)
        exercises = [captioning(draw(web_captions(truths[index]), rng).text, rng) for index in chosen]
        batch = training_batch(exercises, tokenizers, num_queries=NUM_QUERIES)
        teacher.step(model(pixel_values=images[torch.from_numpy(chosen)], **batch).loss)
    print(f"Q-Former: loss {teacher.last_loss:.4f}")
    model.eval()
