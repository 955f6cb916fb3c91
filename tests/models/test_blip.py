"""Folders of InstructBLIP and BLIP-2 as they are published, read as our InstructBLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Blip2Config, Blip2ForConditionalGeneration

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.models.build import build_empty, config_of, open_weights
from moe_lvlm.models.config import with_fields
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.weights import load_weights
from tests.tiny_models import blip_batch, shake, tiny_blip, tiny_blip_config


def tiny_blip2(**qformer: Any) -> Blip2ForConditionalGeneration:
    """A BLIP-2 of the shape of `tiny_blip`."""
    fields = tiny_blip_config().to_dict()
    queries = {k: v for k, v in fields["qformer_config"].items() if k not in ("model_type", "vocab_size")} | qformer
    vision = {k: v for k, v in fields["vision_config"].items() if k != "model_type"}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=queries,
        text_config=fields["text_config"],
        num_query_tokens=fields["num_query_tokens"],
        image_token_index=fields["image_token_index"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Blip2ForConditionalGeneration(config)
    shake(model, scale=0.1, seed=1)
    return model.eval()


def load(folder: Path, **options: Any) -> MoEInstructBlipForConditionalGeneration:
    model = build_empty(config_of(folder, **options))
    load_weights(model, open_weights(folder, **options))
    assert isinstance(model, MoEInstructBlipForConditionalGeneration)
    return model.eval()


def test_blip2_takes_words_from_an_instructblip(tmp_path: Path) -> None:
    """Queries that see no word are BLIP-2's own; words embeddings and text FFNs are the other's."""
    blip2, words = tiny_blip2(), tiny_blip()
    blip2.save_pretrained(tmp_path / "blip2")
    words.save_pretrained(tmp_path / "words")
    model = load(tmp_path / "blip2", text_from=str(tmp_path / "words"))
    taken = model.state_dict()
    theirs = blip2.state_dict()
    for name, value in words.state_dict().items():
        if (
            ".intermediate.dense" in name
            or "word_embeddings" in name
            or (".output.dense" in name and "attention" not in name)
        ):
            if name.startswith("qformer."):
                assert torch.equal(taken[name], value), name
        elif name in theirs:
            assert torch.equal(taken[name], theirs[name]), name
    assert torch.equal(taken["qformer.embeddings.layernorm.weight"], theirs["qformer.layernorm.weight"])

    batch = blip_batch()
    with torch.no_grad():
        features = blip2.vision_model(batch["pixel_values"]).last_hidden_state
        expected = blip2.qformer(
            query_embeds=blip2.query_tokens.expand(4, -1, -1), encoder_hidden_states=features
        ).last_hidden_state
        ids = batch["qformer_input_ids"]
        found = model.qformer(
            input_ids=ids,
            attention_mask=torch.cat((torch.ones(4, 3), torch.zeros(ids.shape)), dim=1).long(),
            query_embeds=model.query_tokens.expand(4, -1, -1),
            encoder_hidden_states=features,
        ).last_hidden_state[:, :3]
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_blip2_without_words_is_refused(tmp_path: Path) -> None:
    tiny_blip2().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"Q-Former has no words to read .* allowed: an InstructBLIP folder, or .*text_from"
    ):
        config_of(tmp_path)
    with pytest.raises(ValueError, match="allowed: an InstructBLIP folder"):
        config_of(tmp_path, text_from=str(tmp_path))


def test_words_of_another_width_are_refused(tmp_path: Path) -> None:
    tiny_blip2(intermediate_size=28).save_pretrained(tmp_path / "blip2")
    tiny_blip().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"text_from: .* qformer_config.intermediate_size is 24; allowed, .*: 28"):
        config_of(tmp_path / "blip2", text_from=str(tmp_path / "words"))


def test_an_instructblip_needs_no_other_words(tmp_path: Path) -> None:
    tiny_blip().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a text side of its own"):
        config_of(tmp_path, text_from=str(tmp_path))


def test_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    stock = tiny_blip()
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["qformer.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).query_tokens, stock.query_tokens)


def test_a_folder_without_an_image_token_is_refused(tmp_path: Path) -> None:
    tiny_blip().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["image_token_index"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: image_token_index is missing"):
        config_of(tmp_path)


@pytest.mark.parametrize("missing", ["qformer.encoder.layer.3.intermediate_query.dense.weight", "query_tokens"])
def test_nothing_is_left_at_random(missing: str, tmp_path: Path) -> None:
    """Also of what experts begin with."""
    tiny_blip().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors")
    model = build_empty(with_fields(config_of(tmp_path), experts=ExpertSettings(num_layers=2).model_dump(mode="json")))
    with pytest.raises(ValueError, match=missing):
        load_weights(model, open_weights(tmp_path))
