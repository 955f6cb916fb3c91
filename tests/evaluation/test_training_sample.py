"""A sample of the training data through LoRA experts, against prompts written out by hand and run one by one."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from moe_lvlm.analysis.instructions import Instruction
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.instructions import instruction_hash
from moe_lvlm.data.mixture import build_samples
from moe_lvlm.evaluation.loaded import LoadedRun
from moe_lvlm.evaluation.training_sample import route_training_data
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.processor import num_image_tokens
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.routing.types import Site

from .conftest import IMAGE_SIZE, IMAGE_TOKENS, NAMES

ASKED = ("what is it ?", "how many cat ?", "where is dog ?", "how many dog ?", "is it left ?")
TOLD = ("cat dog", "one two", "two cat")
NUM_LAYERS, TARGETS = 3, ("q_proj", "v_proj")


def prompt_ids(question: str) -> list[int]:
    """The tiny tokenizer's words and the tiny chat template, written out."""
    words = ["<s>", "Q", ":", *["<image>"] * IMAGE_TOKENS, *question.split(), "A", ":"]
    return [NAMES.index(word) for word in words]


def write_data(folder: Path) -> torch.Tensor:
    """Two datasets that ask about one image, and one whose file is not there; the image's pixels."""
    folder.mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    for name, texts in (("ask", ASKED), ("tell", TOLD)):
        records = [
            {
                "image": "x.png",
                "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "cat"}],
            }
            for text in texts
        ]
        # passed over: its image is not there, and it has no answer
        records += [records[0] | {"image": "lost.png"}, {"conversations": [{"from": "human", "value": "what ?"}]}]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1


def write_table(path: Path, clusters: dict[str, int], *, datasets: tuple[str, ...] | None = None) -> None:
    hashes = sorted((instruction_hash(text), cluster) for text, cluster in clusters.items())
    ClusterTable(
        centres_KW=np.eye(2, 6, dtype=np.float32),
        hashes_I=np.array([number for number, _ in hashes], dtype=np.uint64),
        ids_I=np.array([cluster for _, cluster in hashes], dtype=np.int32),
        probe_W=np.ones(6, dtype=np.float32),
        encoder="none/such",
        seed=0,
        datasets=datasets,
    ).save(path)


def recipe_of(folder: Path, settings: MoCLESettings, *, sources: tuple[str, ...]) -> Recipe:
    content = {
        "name": "tiny",
        "model": {"from_pretrained": str(folder), "adapter": settings.model_dump(mode="json")},
        "data": {
            "image_root": str(folder / "data"),
            "mixture": [{"path": f"{name}.json"} for name in sources],
            "clusters": "table.safetensors" if settings.reads_table else None,
        },
        "stages": [
            {"name": "tune", "adapt": True, "train": ["connector", "adapter"], "steps": 1, "learning_rate": 0.001}
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(folder / "recipe.yaml")


def load_by_hand(
    dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, settings: MoCLESettings
) -> LoadedRun:
    model = as_moe_llava(copy.deepcopy(dense_model))
    adapt(model, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gate" in name.split(".") or "adapter_table" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    builder = build_samples(recipe.data, recipe.data.template, processor, num_image_tokens)
    return LoadedRun(model.eval(), processor, builder, ())


def settings_of(gating: str, **fields: Any) -> MoCLESettings:
    defaults = {"rank": 2, "num_experts": 3, "num_clusters": 2, "embedding_width": 6, "temperature": 0.5}
    return MoCLESettings.model_validate(defaults | {"gating": gating, "target_modules": TARGETS} | fields)


def decisions_by_hand(
    model: PreTrainedModel, texts: tuple[str, ...], pixels: torch.Tensor, **facts: int
) -> tuple[dict[Site, Counter[int]], float]:
    """Experts by site and the mean gate, one prompt at a time."""
    taken: dict[Site, Counter[int]] = {}
    gates = []
    for text in texts:
        ids = prompt_ids(text)
        instruction = [int(id >= NAMES.index("what") and place >= 7) for place, id in enumerate(ids)]
        # the user's words stand between the marks and "A :"
        instruction[-2:] = [0, 0]
        with torch.no_grad():
            trace = model(
                input_ids=torch.tensor([ids]),
                pixel_values=pixels,
                instruction_mask=torch.tensor([instruction]),
                output_routing=True,
                **{name: torch.tensor([value]) for name, value in facts.items()},
            ).routing
        for site, decision in trace.items():
            taken.setdefault(site, Counter()).update(decision.expert_ids_RK.flatten().tolist())
            gates += decision.weights_RK[:, 0].tolist()
    return taken, float(np.mean(gates))


def test_each_dataset_is_routed_as_its_prompts_are(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    pixels, settings = write_data(tmp_path / "data"), settings_of("sentence")
    recipe = recipe_of(tmp_path, settings, sources=("ask", "gone", "tell"))
    loaded = load_by_hand(dense_model, processor, recipe, settings)
    told: list[int] = []
    sample, adapters = route_training_data(loaded, recipe, batch_size=2, advance=told.append)
    assert told == [1, 1, 1]
    assert {name: sorted(found) for name, found in sample.datasets.items()} == {
        "ask": [Instruction(text, None) for text in sorted(ASKED)],
        "tell": [Instruction(text, None) for text in sorted(TOLD)],
    }
    assert sample.num_clusters is None
    assert list(sample.left_out) == ["gone"]
    assert "gone.json" in sample.left_out["gone"]
    assert len(adapters.linears) == NUM_LAYERS * len(TARGETS)
    for name, texts in (("ask", ASKED), ("tell", TOLD)):
        taken, gate = decisions_by_hand(loaded.model, texts, pixels)
        found = adapters.subsets[name]
        assert found.samples == len(texts)
        assert found.gate[0] == pytest.approx(gate, abs=1e-5)
        for place, site in enumerate(adapters.linears):
            assert found.experts_LE[place].tolist() == [taken[site][expert] for expert in range(3)]
    everything = sum(subset.experts_LE for subset in adapters.subsets.values())
    assert (np.asarray(everything) > 0).sum() > len(adapters.linears)  # else nothing could be mixed up


def test_clusters_are_those_of_the_table(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    pixels, settings = write_data(tmp_path / "data"), settings_of("cluster")
    clusters = {text: int("how" in text) for text in (*ASKED, *TOLD)}
    write_table(tmp_path / "data" / "table.safetensors", clusters)
    recipe = recipe_of(tmp_path, settings, sources=("ask", "tell"))
    loaded = load_by_hand(dense_model, processor, recipe, settings)
    sample, adapters = route_training_data(loaded, recipe, batch_size=3)
    assert sorted(sample.datasets["ask"]) == sorted(Instruction(text, clusters[text]) for text in ASKED)
    assert sample.clusters_by_dataset().tolist() == [[3, 2], [3, 0]]
    assert adapters.subsets["ask"].clusters == {0: 3, 1: 2}
    for cluster, count in ((0, 6), (1, 2)):
        taken, _ = decisions_by_hand(loaded.model, ASKED[:1], pixels, cluster_ids=cluster)
        for place, site in enumerate(adapters.linears):
            (expert,) = taken[site]
            assert adapters.by_cluster[cluster][place].tolist() == [count * (expert == one) for one in range(3)]


def test_a_dataset_of_the_mixture_is_its_own_row(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    write_data(tmp_path / "data")
    settings = settings_of("dataset")
    # nearest would be the other dataset's mean
    write_table(tmp_path / "data" / "table.safetensors", dict.fromkeys(ASKED, 1), datasets=("ask", "tell"))
    recipe = recipe_of(tmp_path, settings, sources=("ask",))
    loaded = load_by_hand(dense_model, processor, recipe, settings)
    sample, adapters = route_training_data(loaded, recipe, batch_size=8)
    assert sample.clusters_by_dataset().tolist() == [[5, 0]]
    assert adapters.subsets["ask"].clusters == {0: 5}


def test_a_limit_holds_for_both(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    write_data(tmp_path / "data")
    settings = settings_of("token", has_universal=False)
    recipe = recipe_of(tmp_path, settings, sources=("ask", "tell"))
    loaded = load_by_hand(dense_model, processor, recipe, settings)
    found = [route_training_data(loaded, recipe, batch_size=2, limit=2) for _ in range(2)]
    sample, adapters = found[0]
    assert [len(texts) for texts in sample.datasets.values()] == [2, 2]
    assert [subset.samples for subset in adapters.subsets.values()] == [2, 2]
    tokens = sum(len(prompt_ids(one.text)) for one in sample.datasets["ask"])
    assert adapters.subsets["ask"].rows_L.tolist() == [tokens] * len(adapters.linears)
    assert found[1][0] == sample  # the same records each time


def test_a_dataset_without_a_usable_record_is_left_out(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    write_data(tmp_path / "data")
    (tmp_path / "data" / "x.png").unlink()
    settings = settings_of("sentence")
    recipe = recipe_of(tmp_path, settings, sources=("ask",))
    sample, adapters = route_training_data(load_by_hand(dense_model, processor, recipe, settings), recipe, batch_size=2)
    assert (sample.datasets, len(adapters)) == ({}, 0)
    assert "none of 7 records drawn can be used; the last:" in sample.left_out["ask"]


def test_a_model_without_lora_experts_is_refused(
    tmp_path: Path, dense_model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    write_data(tmp_path / "data")
    settings = settings_of("sentence")
    recipe = recipe_of(tmp_path, settings, sources=("ask",))
    loaded = load_by_hand(dense_model, processor, recipe, settings)
    plain = LoadedRun(as_moe_llava(copy.deepcopy(dense_model)), loaded.processor, loaded.builder, ())
    with pytest.raises(ValueError, match="tiny: the model has no LoRA experts"):
        route_training_data(plain, recipe, batch_size=2)
