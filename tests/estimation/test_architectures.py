"""Sizes of published models: how many parameters their makers say that they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe_lvlm.config.load import load_recipe
from moe_lvlm.estimation.architectures import PUBLISHED, stage_model
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_run import write_run_inputs

# From the model cards, and the headers of the published weights
PARAMETERS = {
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "microsoft/phi-2": 2_779_683_840,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    fields = dict(PUBLISHED[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    is_tower = config.model_type.endswith("vision_model")
    with init_empty_weights():
        model = (AutoModel if is_tower else AutoModelForCausalLM).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_row_of_ltdr() -> None:
    recipe = load_recipe("ltdr/ltdr_stablelm")
    dense = stage_model(recipe, recipe.stage_index("tune"))
    assert not moe_layers(dense)
    sparse = stage_model(recipe, recipe.stage_index("sparse"))
    layers = moe_layers(sparse)
    assert len(layers) == 12
    assert all(parameter.is_meta for parameter in sparse.parameters())
    trained = sum(parameter.numel() for parameter in sparse.parameters() if parameter.requires_grad)
    assert trained == 12 * (4 * 3 * 2048 * 5632 + 4 * 2048)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mocle/llava_mocle", ("lora_A", "vision_tower")),
        ("qmoe/qmoe_vicuna", ("qformer", "router")),
        ("qmoe/qformer_flan_t5", ("decoder.block.23", "qformer")),
        ("mocle/instructblip_mocle", ("lora_A", "qformer")),
    ],
)
def test_other_recipes(name: str, parts: tuple[str, ...]) -> None:
    recipe = load_recipe(name)
    names = "\n".join(name for name, _ in stage_model(recipe, len(recipe.stages) - 1).named_parameters())
    assert all(part in names for part in parts)


def test_parts_that_are_here(tmp_path: Path) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path))
    model = stage_model(recipe, len(recipe.stages) - 1)
    assert model.config.text_config.hidden_size == 32


def test_a_folder_of_configurations(tmp_path: Path) -> None:
    recipe = load_recipe("ltdr/ltdr_stablelm", ["model.language_model.from_pretrained=someone/some-model"])
    with pytest.raises(ValueError, match=r"someone/some-model: neither here nor among .*--config-dir"):
        stage_model(recipe, 2)
    folder = tmp_path / "someone" / "some-model"
    folder.mkdir(parents=True)
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(fields))
    model = stage_model(recipe, 2, config_dir=tmp_path)
    assert model.lm_head.weight.shape == (1024, 64)
