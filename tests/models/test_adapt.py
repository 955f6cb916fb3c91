"""Adapters in whole models: what the hosts tell them, in training, in evaluation and from step to step of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from moe_lvlm.adapters import adapted_linears, adapter_parameters
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.training.trainable import select_trainable
from tests.adapters.problems import mocle, shake_adapters, targets_of
from tests.tiny_models import (
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    blip_batch,
    collate,
    tiny_llava,
    tiny_moe_blip,
    tiny_moe_llava,
    tiny_samples,
)

GATINGS: list[dict[str, Any]] = [
    {"gating": "cluster"},
    {"gating": "dataset"},
    {"gating": "sentence"},
    {"gating": "token"},
    {"gating": "cluster", "compat": "released"},
    {"gating": "cluster", "has_universal": False, "top_k": 2},
]
every_gating = pytest.mark.parametrize("fields", GATINGS, ids=lambda fields: "-".join(map(str, fields.values())))
HOSTS = ["llava-llama", "llava-phi", "blip-llama", "blip-opt"]


def dense(host: str) -> PreTrainedModel:
    kind, family = host.split("-")
    if kind == "blip":
        return tiny_moe_blip(None, family)
    return as_moe_llava(tiny_llava(family))


def adapted(host: str, settings: LoRASettings) -> PreTrainedModel:
    """Adapters that do something."""
    model = dense(host)
    adapt(model, settings, seed=0)
    shake_adapters(model)
    return model.eval()


def settings_for(host: str, **fields: Any) -> MoCLESettings:
    return mocle(target_modules=targets_of(host.split("-")[1]), **fields)


def prompts(host: str, *, side: str = "left") -> dict[str, Tensor]:
    """Three or four prompts of several lengths, and all that a gate may ask about them."""
    if host.startswith("blip"):
        given = blip_batch()
        batch = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "labels"}
        if side == "left":
            lengths = batch["attention_mask"].sum(dim=1)
            for row, length in enumerate(lengths.tolist()):
                shift = batch["input_ids"].shape[1] - length
                for key in ("input_ids", "attention_mask"):
                    batch[key][row] = batch[key][row].roll(shift)
    else:
        batch = collate(tiny_samples(), side=side)
        del batch["labels"]
    is_word = (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE_ID)
    number = torch.arange(len(batch["input_ids"]))
    return batch | {"instruction_mask": is_word.long(), "cluster_ids": number % 4, "dataset_ids": (number + 1) % 4}


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt without its padding. Row 3, the last, has one image, which is the last."""
    is_token = batch["attention_mask"][row] == 1
    places = {"pixel_values", "qformer_input_ids", "qformer_attention_mask"}
    cut = {name: value[row : row + 1] for name, value in batch.items() if name not in places}
    for name in ("input_ids", "attention_mask", "instruction_mask"):
        cut[name] = cut[name][:, is_token]
    return cut | {name: batch[name][-1:] for name in places if name in batch}


@torch.no_grad()
def answer_without_cache(model: PreTrainedModel, batch: dict[str, Tensor], steps: int) -> Tensor:
    """Greedy tokens but for the image mark and the end, each from the whole sequence by a forward pass of its own."""
    batch = dict(batch)
    new = []
    for _ in range(steps):
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions, use_cache=False).logits[:, -1]
        logits[:, [IMAGE_ID, EOS_ID]] = -torch.inf
        new.append(logits.argmax(dim=-1, keepdim=True))
        batch["input_ids"] = torch.cat((batch["input_ids"], new[-1]), dim=1)
        for key, value in (("attention_mask", 1), ("instruction_mask", 0)):
            batch[key] = torch.nn.functional.pad(batch[key], (0, 1), value=value)
    return torch.cat(new, dim=1)


@every_gating
@pytest.mark.parametrize("host", HOSTS)
def test_generate_answers_as_forward_does(host: str, fields: dict[str, Any]) -> None:
    """With a cache and without, in a batch with padding and for a prompt without any."""
    model = adapted(host, settings_for(host, **fields))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    for batch in (prompts(host), alone(prompts(host), 3)):
        expected = answer_without_cache(model, batch, 5).tolist()
        given = batch["input_ids"].shape[1]
        for use_cache in (True, False):
            answers = model.generate(**batch, **options, use_cache=use_cache, pad_token_id=PAD_ID)
            assert answers[:, given:].tolist() == expected
        assert len(expected) == 1 or len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("host", ["llava-llama", "blip-opt"])
def test_beams_of_a_sample_share_its_gates(host: str) -> None:
    """Beams of one sample alone are those that it has among others."""
    model = adapted(host, settings_for(host))
    batch = prompts(host)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    answers = model.generate(**batch, **options, pad_token_id=PAD_ID)
    again = model.generate(**alone(batch, 3), **options, pad_token_id=PAD_ID)
    by_itself = again[0, alone(batch, 3)["input_ids"].shape[1] :].tolist()
    among_others = answers[3, batch["input_ids"].shape[1] :].tolist()
    assert by_itself == among_others[: len(by_itself)]
    assert set(among_others[len(by_itself) :]) <= {PAD_ID}


@pytest.mark.parametrize("host", HOSTS)
def test_the_cluster_decides(host: str) -> None:
    model = adapted(host, settings_for(host))
    batch = prompts(host, side="right")
    with torch.no_grad():
        one, other = (
            model(**batch | {"cluster_ids": torch.full_like(batch["cluster_ids"], cluster)}).logits
            for cluster in (0, 1)
        )
    assert float((one - other).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "settings", [LoRASettings(rank=2), mocle(target_modules=("q_proj",))], ids=lambda one: one.kind
)
@pytest.mark.parametrize("host", ["llava-llama", "blip-llama"])
def test_new_adapters_change_nothing(host: str, settings: LoRASettings) -> None:
    model, batch = dense(host), prompts(host, side="right")
    with torch.no_grad():
        before = model(**batch).logits
        adapt(model, settings, seed=1)
        after = model.eval()(**batch).logits
    assert torch.equal(before, after)


def test_a_single_lora_needs_no_facts() -> None:
    for host in HOSTS:
        model = adapted(host, LoRASettings(rank=2, target_modules=targets_of(host.split("-")[1])))
        batch = prompts(host)
        bare = {key: batch[key] for key in batch if key not in ("instruction_mask", "cluster_ids", "dataset_ids")}
        assert not model.config.is_routed
        output = model(**bare, output_routing=True)
        assert output.routing is None
        answers = model.generate(**bare, max_new_tokens=3, do_sample=False, pad_token_id=PAD_ID)
        assert answers.shape[0] == len(batch["input_ids"])


@pytest.mark.parametrize(
    ("gating", "names"),
    [("cluster", {"cluster_ids"}), ("dataset", {"dataset_ids"}), ("sentence", {"instruction_mask"}), ("token", set())],
)
def test_what_gates_ask_is_said_and_missed(gating: str, names: set[str]) -> None:
    model = adapted("blip-llama", mocle(gating=gating))
    assert model.config.prompt_facts == names
    batch = prompts("blip-llama", side="right")
    for name in names:
        with pytest.raises(ValueError, match=f"adapter gating {gating}"):
            model(**{key: value for key, value in batch.items() if key != name})


@pytest.mark.parametrize("host", ["llava-llama", "blip-opt"])
def test_the_configuration_rebuilds_the_model(host: str, tmp_path: Path) -> None:
    model = adapted(host, settings_for(host, noise=0.5))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.adapter_settings == settings_for(host, noise=0.5)
    batch = prompts(host, side="right")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    empty = build_empty(model.config)
    shapes = {name: one.shape for name, one in empty.named_parameters()}
    assert {name: shapes[name] for name in adapter_parameters(empty)} == {
        name: model.get_parameter(name).shape for name in adapter_parameters(model)
    }


def test_only_adapters_are_trained() -> None:
    model = adapted("llava-llama", mocle(target_modules=("q_proj", "up_proj"), compat="released"))
    select_trainable(model, ["adapter"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(model)
    layer = "model.language_model.layers.1"
    leaves = {"lora_A", "lora_B", "gate.weight", "gate.bias", "table.weight"}
    expected = {f"{layer}.{linear}.{leaf}" for linear in ("self_attn.q_proj", "mlp.up_proj") for leaf in leaves}
    assert {name for name in trained if name.startswith(layer)} == expected
    paper = adapted("blip-opt", mocle())
    assert {name for name in adapter_parameters(paper) if "layers" not in name} == {
        "language_model.model.decoder.adapter_table.weight"
    }
    with pytest.raises(ValueError, match=r"'adapter' names no parameter of this model .*adapt"):
        select_trainable(dense("llava-llama"), ["adapter"])


def test_experts_and_adapters_stand_side_by_side() -> None:
    """Losses and statistics of experts are as without adapters, whose decisions are no layer's with experts."""
    config = MoEConfig(num_experts=3, top_k=2)
    model = tiny_moe_llava(config)
    assert isinstance(model, MoELlavaForConditionalGeneration)
    batch = collate(tiny_samples())
    before = model(**batch)
    adapt(model, mocle(target_modules=("q_proj",)), seed=0)
    after = model.eval()(**batch, cluster_ids=torch.arange(4), output_routing=True)
    assert before.balance_loss is not None and float(before.balance_loss.detach()) > 0
    assert_close(after.balance_loss, before.balance_loss, atol=0, rtol=0)
    assert {site.part for site, _ in after.routing.items()} == {"language_model", "adapter.self_attn.q_proj"}


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="T5Stack has no decoder layers"):
        adapt(tiny_moe_blip(None, "t5"), mocle(), seed=0)


def test_adapters_are_drawn_from_the_seed_alone() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = dense("llava-llama")
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        adapt(model, mocle(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(adapted_linears(model)[0][1].lora_A.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
