"""The words of the scenes pack: records in LLaVA's layout, the tokenizer that knows them, and the dialogues that teach
the language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scenes_teaching import IGNORED, Dialogue
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_lvlm.data.scenes import Scene, Task, ask, describe

RECORDS_AN_IMAGE = 3
TURNS = 3
DESCRIBE = "Describe the image."
DESCRIBE_SHARE = 0.3
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKS = {"image": "<image>", "user": "<user>", "assistant": "<assistant>"}
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- else -%}
        {%- for part in content -%}
            {{- '<image>\\n' if part['type'] == 'image' else part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{{ '<user> ' + text(message['content']) + ' ' }}
    {%- elif message['role'] == 'assistant' -%}{{ '<assistant> ' + text(message['content']) + eos_token }}
    {%- else -%}{{ raise_exception('roles are user and assistant, got ' + message['role']) }}
    {%- endif -%}
{%- endfor -%}
{{- '<assistant>' if add_generation_prompt -}}
"""


def train_records(scenes: Sequence[Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """RECORDS_AN_IMAGE conversations an image, each of up to TURNS of its questions in random order."""
    records = []
    for index, scene in enumerate(scenes):
        questions = [(question.question, question.answer) for question in ask(scene)]
        for number in range(RECORDS_AN_IMAGE):
            turns = [questions[chosen] for chosen in rng.permutation(len(questions))[:TURNS]]
            if rng.random() < DESCRIBE_SHARE:
                turns[-1] = (DESCRIBE, describe(scene))
            records.append(
                {
                    "id": f"train-{index:05d}-{number}",
                    "image": f"train/{index:05d}.webp",
                    "conversations": conversation(turns),
                }
            )
    return records


def caption_records(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """One caption an image."""
    return [
        {
            "id": f"caption-{index:05d}",
            "image": f"train/{index:05d}.webp",
            "conversations": conversation([(DESCRIBE, describe(scene))]),
        }
        for index, scene in enumerate(scenes)
    ]


def test_records(scenes: Sequence[Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """One question a task and image, where the image has one for the task."""
    records = []
    for index, scene in enumerate(scenes):
        for task in Task:
            questions = [question for question in ask(scene) if question.task is task]
            if questions:
                question = questions[rng.integers(len(questions))]
                records.append(
                    {
                        "id": f"test-{index:05d}-{task}",
                        "image": f"test/{index:05d}.webp",
                        "mask": f"masks/{index:05d}.png",
                        "task": str(task),
                        "conversations": conversation([(question.question, question.answer)]),
                    }
                )
    return records


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's form, with the image's mark before the first question."""
    rows = []
    for number, (question, answer) in enumerate(turns):
        rows.append({"from": "human", "value": question if number else f"{MARKS['image']}\n{question}"})
        rows.append({"from": "gpt", "value": answer})
    return rows


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one lower-case word or punctuation mark a token: all that occur in the texts."""
    marks = [*SPECIAL.values(), *MARKS.values()]
    split = pre_tokenizers.Whitespace()
    words = set()
    for text in set(texts):
        words |= {word for word, _ in split.pre_tokenize_str(text.replace(MARKS["image"], "").lower())}
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*marks, *sorted(words)])}, SPECIAL["unk_token"])
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    # joins words with spaces and takes away those before punctuation
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(MARKS.values()),
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
        **SPECIAL,
    )


def text_dialogues(
    scenes: Sequence[Scene], records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> list[Dialogue]:
    """The training conversations without images, the caption in the image's place: told by the assistant first, by
    the user, or alone."""
    dialogues = []
    for number, record in enumerate(records):
        caption = describe(scenes[number // RECORDS_AN_IMAGE])
        turns = [
            {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
            for turn in record["conversations"]
        ]
        first = turns[0]["content"].removeprefix(f"{MARKS['image']}\n")
        by_user = number % 2 == 0
        turns[0] = {"role": "user", "content": f"{caption} {first}" if by_user else first}
        if not by_user:
            turns[:0] = [{"role": "user", "content": DESCRIBE}, {"role": "assistant", "content": caption}]
        told = len(tokenizer(caption).input_ids) if by_user else 0
        dialogues.append(_supervised(tokenizer.apply_chat_template(turns, tokenize=False), told, tokenizer))
        if number % RECORDS_AN_IMAGE == 0:
            ids = tokenizer(f"{tokenizer.bos_token}{caption}{tokenizer.eos_token}").input_ids
            dialogues.append(Dialogue(ids, ids))
    return dialogues


def _supervised(text: str, told: int, tokenizer: PreTrainedTokenizerFast) -> Dialogue:
    """Labels on the answers, and on the `told` tokens of a caption after <s> <user>."""
    ids = tokenizer(text).input_ids
    user, assistant = tokenizer.convert_tokens_to_ids([MARKS["user"], MARKS["assistant"]])
    labels, is_answer = [], False
    for position, token in enumerate(ids):
        is_answer = token != user and is_answer
        labels.append(token if is_answer or 2 <= position < 2 + told else IGNORED)
        is_answer = is_answer or token == assistant
    return Dialogue(ids, labels)
