"""The experiment on a conflict: its tasks contradict one another, its budgets are what they are said to be, and the tables
of clusters keep the tasks apart."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe_lvlm.adapters import attach
from moe_lvlm.config.adapter import LoRASettings
from moe_lvlm.config.load import load_recipe
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.packs import resolve
from moe_lvlm.data.scenes import COLOURS, EMOJI

TASKS = ("plain", "image", "describe", "objects")
EVALUATED = ("test", "new")
MARK = "<image>\n"
# Trained weights of a row, by hand: up_proj and down_proj of 4 layers, 96 to 256 and back, so 4 x 2 x 352 a rank. Five LoRAs
# of rank 4 are 56,320; gates 8 x 4 x 384 and a table of 16 or 4 rows of 384, or gates of 4 x 4 x (96 + 256).
WEIGHTS = {
    "conflict_lora": 22_528,
    "conflict_lora_wide": 76_032,
    "conflict_mocle": 74_752,
    "conflict_dataset": 70_144,
    "conflict_sentence": 61_952,
    "conflict_token": 61_952,
}


def records(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(resolve(f"package:mocle/conflict/{name}.json").read_text(encoding="utf-8"))
    return found


def question(record: dict[str, Any]) -> str:
    text: str = record["conversations"][0]["value"]
    return text.removeprefix(MARK)


def answer(record: dict[str, Any]) -> str:
    text: str = record["conversations"][1]["value"]
    return text


def true_answers(name: str) -> dict[tuple[str, str], str]:
    """What the pack scenes says: (picture, question) -> answer."""
    found: dict[tuple[str, str], str] = {}
    for record in json.loads(resolve(f"package:scenes/{name}.json").read_text(encoding="utf-8")):
        turns = [turn["value"].removeprefix(MARK) for turn in record["conversations"]]
        found |= {(record["image"], asked): told for asked, told in zip(turns[::2], turns[1::2], strict=True)}
    return found


def plain_question(record: dict[str, Any]) -> str:
    """What is asked, in the words of the pack scenes."""
    place = re.search("(top|bottom) (left|right)", question(record))
    return "What color is the background?" if place is None else f"What is at the {place[0]}?"


def adapter(name: str) -> LoRASettings:
    found = load_recipe(f"mocle/{name}").model.adapter
    assert found is not None
    return found


@pytest.mark.parametrize("name", WEIGHTS)
def test_trained_weights(name: str) -> None:
    config = LlamaConfig.from_pretrained(resolve("package:scenes/language_model"))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    before = sum(weight.numel() for weight in model.parameters())
    attach(model.model, adapter(name))
    assert sum(weight.numel() for weight in model.parameters()) - before == WEIGHTS[name]


def test_the_single_lora_has_no_smaller_budget() -> None:
    """Less than a rank more than MoCLE's, and no row of experts has more."""
    wide = WEIGHTS["conflict_lora_wide"]
    assert all(WEIGHTS[name] <= wide for name in WEIGHTS)
    assert wide - WEIGHTS["conflict_mocle"] < 2 * 4 * 352
    single, ours = adapter("conflict_lora"), adapter("conflict_mocle")
    assert single.rank == 2 * ours.rank
    assert {adapter(name).scale for name in WEIGHTS} == {ours.scale}


def test_answers_are_the_true_ones_moved_on() -> None:
    known = {"train": true_answers("train"), "test": true_answers("test")}
    files = {name: [(name, record) for record in records(name)] for name in TASKS}
    files |= {name: [(record["dataset"], record) for record in records(name)] for name in EVALUATED}
    for name, found in files.items():
        truths = known["test" if name in EVALUATED else "train"]
        for task, record in found:
            asked = plain_question(record)
            listed = list(EMOJI if "at the" in asked else COLOURS)
            place = listed.index(truths[record["image"], asked])
            assert answer(record) == listed[(place + TASKS.index(task)) % len(listed)]


def test_tasks_contradict_one_another_and_are_asked_in_words_of_their_own() -> None:
    told: dict[tuple[str, str], set[str]] = defaultdict(set)
    askers: dict[str, set[str]] = defaultdict(set)
    for name in TASKS:
        for record in records(name):
            told[record["image"], plain_question(record)].add(answer(record))
            askers[question(record)].add(name)
    assert len(told) == 2400
    assert all(len(answers) == len(TASKS) for answers in told.values())
    assert all(len(names) == 1 for names in askers.values())
    assert Counter(min(names) for names in askers.values()) == dict.fromkeys(TASKS, 15)
    # and the language model can read and say every word
    tokenizer = AutoTokenizer.from_pretrained(resolve("package:scenes/language_model"))
    for name in (*TASKS, *EVALUATED):
        for text in {text for record in records(name) for text in (question(record), answer(record))}:
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_evaluation_is_of_pictures_and_of_words_that_are_new() -> None:
    trained = [record for name in TASKS for record in records(name)]
    for name in EVALUATED:
        found = records(name)
        assert Counter(record["dataset"] for record in found) == dict.fromkeys(TASKS, 150)
        assert not {record["image"] for record in found} & {record["image"] for record in trained}
    asked = {question(record) for record in trained}
    assert {question(record) for record in records("test")} <= asked
    assert not {question(record) for record in records("new")} & asked


@pytest.mark.parametrize("name", ["conflict_16", "conflict_datasets"])
def test_a_cluster_is_of_one_task(name: str) -> None:
    """Of the wordings that are trained on and of those that are kept for evaluation."""
    table = ClusterTable.load(resolve(f"package:mocle/{name}.safetensors"))
    tasks: dict[int, set[str]] = defaultdict(set)
    for file in (*TASKS, *EVALUATED):
        for record in records(file):
            cluster = table.find(question(record))
            assert cluster is not None
            tasks[cluster].add(record["dataset"])
    assert sorted(tasks) == list(range(table.num_clusters))
    assert all(len(held) == 1 for held in tasks.values())
    if table.datasets is not None:
        assert table.datasets == TASKS
        assert all(held == {TASKS[cluster]} for cluster, held in tasks.items())
