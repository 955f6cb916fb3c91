"""The model card: front matter that a hub reads, and what it tells of a model and its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.conversion.model_card import CardFacts, ParameterCounts, render_card
from moe_lvlm.conversion.provenance import Provenance, read_provenance
from tests.tiny_run import tiny_recipe
from tests.trained_run import write_trained_run

REPORT = {
    "samples": 7, "source": "the run's evaluation sets (colors)", "skipped": 0, "top_k": 2, "tail_k": 4,
    "tail_share": {"0": 0.25, "2": 0.5},
    "rows_per_token": {
        "with_eea": 2.25, "without_eea": 2.0, "vision_with_eea": 2.75, "vision_without_eea": 2.0,
    },
    "logits": {
        "positions": 9, "mean_abs": 0.125, "max_abs": 1.5, "mean_kl": 0.01, "max_kl": 0.1, "greedy_agreement": 0.875,
    },
    "answers": {"generated": 7, "different": 1, "exact_match": {"with_eea": 0.75, "without_eea": 0.5}},
}  # fmt: skip


@pytest.fixture
def facts(tmp_path: Path) -> CardFacts:
    recipe = Recipe.model_validate(tiny_recipe(tmp_path))
    return CardFacts(
        provenance=Provenance(name="tiny", recipe=recipe, checkpoint="sparse-000005", steps=8, tokens=1234),
        form="native",
        architecture="MoELlavaForConditionalGeneration",
        language_model="LlamaModel",
        vision_tower="clip_vision_model",
        reason="router ltdr with EEA",
        caveats=(),
        packages=("pydantic", "torch", "transformers"),
        prompt="prompt = '<image>'",
        dtype="float32",
        parameters=ParameterCounts(total=1_000_000, activated=600_000, activated_tail=900_000),
        moe=MoEConfig.model_validate(recipe.moe),
        adapter=None,
        prompt_facts=frozenset(),
        layers=(0, 2),
        num_layers=3,
        is_eea_off=False,
        eea_report=REPORT,
        license="apache-2.0",
    )


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_what_a_hub_reads(facts: CardFacts) -> None:
    assert front_matter(render_card(facts)) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "vision-language", "mixture-of-experts", "custom_code"],
    }
    stock = front_matter(render_card(replace(facts, form="stock", moe=None, license="unknown")))
    assert (stock["license"], stock["tags"]) == ("unknown", ["llava", "vision-language"])


def test_what_it_tells(facts: CardFacts) -> None:
    card = render_card(facts)
    for words in (
        "# tiny",
        "needs pydantic, torch and transformers",
        "trust_remote_code=True)",
        "| parameters | 1,000,000 |",
        "| activated for a token | 600,000 |",
        "| activated for a vision tail token | 900,000 |",
        "4 experts in decoder layers 0, 2 (of 3, from 0); top 2.",
        "Vision tokens of the long tail take 4 experts",
        "| sparse | `moe` (upcycled) | 5 steps | 8 | 0.01 | train (1) |",
        "* run: tiny, checkpoint sparse-000005",
        "* optimizer steps: 8; tokens: 1,234",
    ):
        assert words in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert MoEConfig.model_validate(settings) == facts.moe
    assert "trust_remote_code" not in render_card(replace(facts, form="stock", reason=None))


def test_what_eea_changes(facts: CardFacts) -> None:
    card = render_card(facts)
    for words in (
        "EEA is on in this export",
        "Measured on 7 samples of the run's evaluation sets (colors).",
        "| rows per token | 2.250 | 2.000 |",
        "| exact match | 0.750 | 0.500 |",
        "| vision tokens in the tail, by layer | 0: 25.0 %; 2: 50.0 % |",
        "| same greedy next token | 87.5 % of 9 |",
        "| generated answers that differ | 1 of 7 |",
    ):
        assert words in card
    unknown = render_card(replace(facts, eea_report={"samples": None, "reason": "no data"}, is_eea_off=True))
    assert "could not be measured: no data." in unknown and "switched off in this export" in unknown
    assert "EEA is" not in render_card(replace(facts, eea_report=None))


def test_parts_are_named_without_this_machines_paths(facts: CardFacts, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["model"] |= {
        "vision_tower": {"from_pretrained": "openai/clip-vit-large-patch14-336"},
        "language_model": {"from_pretrained": str(tmp_path / "vicuna")},
    }
    facts = replace(facts, provenance=Provenance(name="x", recipe=Recipe.model_validate(recipe)))
    card = render_card(facts)
    assert front_matter(card)["base_model"] == ["openai/clip-vit-large-patch14-336"]
    assert "* language model: vicuna" in card and str(tmp_path) not in card


def test_a_run_is_read(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path)
    found = read_provenance(run / "checkpoints" / "sparse-000005")
    assert (found.name, found.checkpoint, found.steps, found.tokens) == ("tiny", "sparse-000005", 8, 1234)
    assert found.stage is not None and (found.stage.name, found.template) == ("sparse", "chat")
    assert found.scores == {"color": {"accuracy": 0.5, "majority": 0.25, "n": 4}}
    assert found.versions == {"python": "3.11.9", "torch": "2.13.0"}
    assert read_provenance(tmp_path) == Provenance(name="tiny", recipe=found.recipe, stage=found.stage)
    (run / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json: allowed: a JSON object"):
        read_provenance(run / "checkpoints" / "sparse-000005")
