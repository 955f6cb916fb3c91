"""A model made of parts on the disk is the one that `build_dense` makes in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

import moe_lvlm
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.folder import summarize, write_converted
from moe_lvlm.conversion.parts import from_parts
from moe_lvlm.models.build import build_dense
from tests.conversion.layouts import write_tokenizer
from tests.tiny_models import shake, tiny_causal_lm

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_tower(folder: Path, kind: str) -> str:
    torch.manual_seed(1)
    if kind == "tower":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**VISION))
    elif kind == "clip":
        model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT))
    else:
        model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
    shake(model, scale=0.1, seed=1)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def settings(
    folder: Path, family: str = "llama", tower: str = "tower", *, is_full: bool = False, **fields: Any
) -> ModelSettings:
    """is_full: the vocabulary has no place for the image token, which is new then."""
    size = write_tokenizer(folder / "language", has_image=not is_full)
    tiny_causal_lm(family, vocab_size=size, **fields).save_pretrained(folder / "language")
    return ModelSettings.model_validate(
        {
            "vision_tower": {
                "from_pretrained": write_tower(folder / "tower", tower),
                "feature_layer": -1,
                "feature_select": "full" if tower == "siglip" else "default",
            },
            "language_model": {"from_pretrained": str(folder / "language")},
        }
    )


@pytest.mark.parametrize(
    ("family", "tower", "is_full", "fields"),
    [
        ("llama", "tower", False, {}),
        ("llama", "clip", True, {}),
        ("qwen2", "siglip", True, {"tie_word_embeddings": True}),
        ("phi", "clip", True, {}),  # a head with a bias
        ("phi3", "tower", True, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_build_dense(
    family: str, tower: str, is_full: bool, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    parts = settings(tmp_path, family, tower, is_full=is_full, **fields)
    expected, _ = build_dense(parts, seed=7, dtype=dtype)
    before = torch.get_rng_state()
    converted = from_parts(parts, seed=7).to(dtype)
    assert torch.equal(torch.get_rng_state(), before)

    state = expected.state_dict()
    if fields:
        assert state.pop("lm_head.weight") is not None
    assert list(converted.weights.names()) == list(state)
    for name, value in state.items():
        assert converted.weights.dtype(name) == dtype
        assert torch.equal(converted.weights.read(name), value), name
    if is_full:
        assert state["model.language_model.embed_tokens.weight"].shape[0] == 64
    write_converted(converted, tmp_path / "ours")
    loaded, processor = moe_lvlm.load(tmp_path / "ours", dtype=dtype)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items() if name in state)
    assert loaded.config.image_token_index == processor.image_token_id
    assert loaded.config.language_head_bias == (family == "phi")
    text = (tmp_path / "ours" / "config.json").read_text()
    assert str(tmp_path) not in text


def test_the_types_of_the_parts_stay(tmp_path: Path) -> None:
    """New weights are float32 unless another type is asked for."""
    parts = settings(tmp_path, is_full=True)
    tiny_causal_lm(vocab_size=14).bfloat16().save_pretrained(tmp_path / "language")
    weights = from_parts(parts, seed=0).weights
    assert weights.dtype("model.language_model.embed_tokens.weight") == torch.bfloat16
    assert weights.read("lm_head.weight", 10, 20).dtype == torch.bfloat16
    assert weights.dtype("model.vision_tower.embeddings.class_embedding") == torch.float32
    assert weights.dtype("model.multi_modal_projector.linear_1.weight") == torch.float32


def test_rows_of_grown_tables(tmp_path: Path) -> None:
    """Any range of rows, across the edge between old and new."""
    weights = from_parts(settings(tmp_path, is_full=True), seed=0).weights
    whole = weights.read("lm_head.weight")
    for start, stop in ((0, 64), (0, 5), (12, 20), (14, 15), (20, 64), (14, 14)):
        assert torch.equal(weights.read("lm_head.weight", start, stop), whole[start:stop])


def test_new_weights_follow_the_seed(tmp_path: Path) -> None:
    parts = settings(tmp_path, is_full=True)
    first, other = (from_parts(parts, seed=seed).weights for seed in (0, 1))
    for name in ("model.multi_modal_projector.linear_1.weight", "lm_head.weight"):
        assert not torch.equal(first.read(name), other.read(name))
    assert torch.equal(first.read("lm_head.weight", 0, 14), other.read("lm_head.weight", 0, 14))


def test_differences_of_the_configuration(tmp_path: Path) -> None:
    summary = summarize(from_parts(settings(tmp_path, is_full=True), seed=0))
    assert summary.differences == ("text_config.vocab_size: 14 -> 64",)
    assert summary.num_parameters == summary.num_activated


def test_parts_of_the_package(tmp_path: Path) -> None:
    parts = ModelSettings.model_validate(
        {
            "vision_tower": {"from_pretrained": "package:scenes/tower", "feature_layer": -1},
            "language_model": {"from_pretrained": "package:scenes/language_model"},
        }
    )
    expected, _ = build_dense(parts, seed=0)
    write_converted(from_parts(parts, seed=0), tmp_path / "ours")
    loaded, _ = moe_lvlm.load(tmp_path / "ours")
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_what_is_refused(tmp_path: Path) -> None:
    parts = settings(tmp_path)
    (tmp_path / "language" / "model.safetensors").rename(tmp_path / "language" / "other.safetensors")
    with pytest.raises(ValueError, match=r"has .*other\.safetensors, .*; allowed are"):
        from_parts(parts, seed=0)
    with pytest.raises(ValueError, match="a conversion needs weights"):
        from_parts(
            ModelSettings.model_validate(
                {
                    "vision_tower": {"from_config": {"model_type": "clip_vision_model"}},
                    "language_model": {"from_pretrained": str(tmp_path / "language")},
                }
            ),
            seed=0,
        )
    with pytest.raises(ValueError, match="give a language model and a vision tower"):
        from_parts(ModelSettings(from_pretrained="x"), seed=0)
