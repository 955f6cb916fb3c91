"""The report on EEA against a plain loop over single samples, with a second model built from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lvlm
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.mixture import build_samples, open_records
from moe_lvlm.evaluation.eea import measure_eea, with_eea_off
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.processor import num_image_tokens
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_models import shake, tiny_llava
from tests.trained_run import write_trained_run

SAMPLES = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("eea"))


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return measure_eea(run, num_samples=SAMPLES, batch_size=4)


def second_model(run: Path, **router: Any) -> MoELlavaForConditionalGeneration:
    """The run's weights in a model whose config.json said something else."""
    model, _ = moe_lvlm.load(run)
    moe = model.config.moe | {"router": model.config.moe["router"] | router}
    other = MoELlavaForConditionalGeneration(model.config.with_moe(moe_lvlm.MoEConfig.model_validate(moe)))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_numbers_by_a_plain_loop(run: Path, report: dict[str, Any]) -> None:
    with_eea, without = moe_lvlm.load(run)[0], second_model(run, eea_select="none")
    recipe = load_recipe(run / "recipe.yaml")
    builder = build_samples(recipe.data, "chat", moe_lvlm.load(run)[1], num_image_tokens)
    source = open_records(RecordsSettings(path="train.json", name="colors"), recipe.data.image_root)
    differences, divergences, equal, tail, vision, rows, tokens = [], [], [], {0: 0, 2: 0}, 0, 0, 0
    for number in range(SAMPLES):
        sample = source.sample(number * len(source) // SAMPLES, builder)
        inputs = {"input_ids": sample.input_ids[None], "pixel_values": sample.pixel_values}
        with torch.no_grad():
            one, other = with_eea(**inputs, output_routing=True), without(**inputs)
        tokens += sample.input_ids.numel()
        vision += int((sample.input_ids == with_eea.config.image_token_id).sum())
        for site, decision in one.routing.items():
            variance = decision.probs_RE.var(dim=-1, unbiased=False)[sample.input_ids == with_eea.config.image_token_id]
            if len(variance):
                tail[site.layer] += int((variance > variance.mean()).sum())
            rows += int(decision.keep_RK.sum())
        for position in range(1, len(sample.labels)):
            if sample.labels[position] != -100:
                a, b = one.logits[0, position - 1], other.logits[0, position - 1]
                differences.append((a - b).abs())
                divergences.append(divergence(a, b))
                equal.append(int(a.argmax()) == int(b.argmax()))
    logits = report["logits"]
    assert logits["positions"] == len(equal) > SAMPLES
    assert logits["greedy_agreement"] == sum(equal) / len(equal)
    assert logits["mean_abs"] == pytest.approx(float(torch.stack(differences).mean()), rel=1e-3)
    assert logits["max_abs"] == pytest.approx(float(torch.stack(differences).max()), rel=1e-3)
    assert logits["max_abs"] > 0.01  # else nothing was measured
    assert logits["mean_kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert logits["max_kl"] == pytest.approx(max(divergences), rel=1e-3)
    assert report["tail_share"] == {str(layer): count / vision for layer, count in tail.items()}
    assert report["rows_per_token"]["with_eea"] == rows / (2 * tokens)
    # a tail token takes 4 experts, another one 2
    mean_tail = sum(tail.values()) / (2 * vision)
    assert report["rows_per_token"]["vision_with_eea"] == pytest.approx(2 + 2 * mean_tail)
    assert (report["rows_per_token"]["without_eea"], report["rows_per_token"]["vision_without_eea"]) == (2, 2)
    assert (report["samples"], report["skipped"], report["top_k"], report["tail_k"]) == (SAMPLES, 0, 2, 4)
    assert report["source"] == "the run's evaluation sets (colors)"


def divergence(a: Tensor, b: Tensor) -> float:
    p, q = a.double().softmax(dim=-1), b.double().softmax(dim=-1)
    return float((p * (p / q).log()).sum())


def test_answers(run: Path, report: dict[str, Any]) -> None:
    """Each answered alone, without cache."""
    _, processor = moe_lvlm.load(run)
    recipe = load_recipe(run / "recipe.yaml")
    builder = build_samples(recipe.data, "chat", processor, num_image_tokens)
    source = open_records(RecordsSettings(path="train.json", name="colors"), recipe.data.image_root)
    answers = []
    for model in (moe_lvlm.load(run)[0], second_model(run, eea_select="none")):
        texts = []
        for number in range(SAMPLES):
            prompt = source.prompt(number * len(source) // SAMPLES, builder)
            ids = prompt.input_ids.tolist()
            for _ in range(3):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids]), pixel_values=prompt.pixel_values).logits[0, -1]
                logits[model.config.image_token_id] = -torch.inf
                if int(logits.argmax()) == processor.tokenizer.eos_token_id:
                    break
                ids.append(int(logits.argmax()))
            texts.append(ids[len(prompt.input_ids) :])
        answers.append(texts)
    expected = [source.record(number * len(source) // SAMPLES).turns[-1].text for number in range(SAMPLES)]
    correct = [
        sum(processor.tokenizer.decode(ids) == right for ids, right in zip(texts, expected, strict=True)) / SAMPLES
        for texts in answers
    ]
    found = report["answers"]
    assert found["generated"] == SAMPLES
    assert found["different"] == sum(a != b for a, b in zip(*answers, strict=True))
    assert found["exact_match"] == {"with_eea": correct[0], "without_eea": correct[1]}


def test_the_twin_shares_its_weights(run: Path) -> None:
    model, _ = moe_lvlm.load(run)
    twin = with_eea_off(model)
    ours = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == ours
    assert all(layer.router.num_slots == 2 for _, layer in moe_layers(twin))
    assert all(layer.router.num_slots == 4 for _, layer in moe_layers(model))


def test_named_records_and_their_images(run: Path, tmp_path: Path) -> None:
    records = json.loads((run.parent / "train.json").read_text())[1:4]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    found = measure_eea(run, num_samples=8, records=tmp_path / "mine.json", image_root=run.parent)
    assert (found["samples"], found["source"]) == (3, "records of mine.json")
    assert found["answers"]["exact_match"] is None  # records by themselves are no test
    with pytest.raises(ValueError, match=r"none\.json"):
        measure_eea(run, records=tmp_path / "none.json")


def test_training_data_where_no_evaluation_set_is_at_hand(tmp_path: Path) -> None:
    gone = {"tasks": [{"name": "gone", "path": "gone.json"}]}
    run = write_trained_run(tmp_path, evaluation=gone)
    found = measure_eea(run, num_samples=4)
    assert (found["samples"], found["source"]) == (4, "the run's training mixture (train)")
    assert found["answers"]["exact_match"] is None
    (tmp_path / "train.json").unlink()
    found = measure_eea(run, num_samples=4)
    assert found["samples"] is None
    assert "gone.json" in found["reason"] and "train.json" in found["reason"]
    assert found.keys() == {"samples", "reason"}


def test_a_model_without_a_run(run: Path, tmp_path: Path) -> None:
    model, processor = moe_lvlm.load(run)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "--records" in measure_eea(tmp_path)["reason"]
    assert measure_eea(tmp_path, num_samples=2, records=run.parent / "train.json")["samples"] == 2


def test_a_model_without_eea() -> None:
    model = upcycle(tiny_llava(), moe_lvlm.MoEConfig())
    shake(model, scale=0.1, seed=0)
    with pytest.raises(ValueError, match="routed by top_k without it"):
        with_eea_off(model)
