"""LLaVA-1.5 in each of its layouts gives the logits that transformers' model gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_lvlm
from moe_lvlm.conversion.folder import write_converted
from moe_lvlm.conversion.llava import from_llava
from moe_lvlm.conversion.original import OriginalOptions
from tests.conversion.layouts import (
    Weights,
    logits,
    save_bin_shards,
    save_safetensors,
    tiny_vlm,
    write_original,
    write_tokenizer,
    write_tower,
    write_transformers,
)

OPTIONS = OriginalOptions()


def before_5(name: str) -> str:
    """What llava-hf's folders hold."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def on_disk_since_5(name: str) -> str:
    return before_5(name).replace("vision_model.", "")


def unchanged(name: str) -> str:
    return name


@pytest.mark.parametrize("rename", [before_5, on_disk_since_5, unchanged])
def test_transformers_layouts(rename: Callable[[str], str], tmp_path: Path) -> None:
    model = tiny_vlm()
    folder = write_transformers(tmp_path / "hf", model, rename=rename)
    converted = from_llava(folder, OPTIONS)
    write_converted(converted, tmp_path / "ours")
    loaded, processor = moe_lvlm.load(tmp_path / "ours")
    assert loaded.config.model_type == "moe_llava"
    assert torch.equal(logits(loaded), logits(model))
    # 8 x 8 pixels in patches of 4, and one token that is left out
    assert (processor.patch_size, processor.num_additional_image_tokens) == (4, 1)
    text = processor(text="<image> what color", images=[torch.zeros(3, 8, 8)], return_tensors="pt")
    assert (text["input_ids"] == loaded.config.image_token_index).sum() == 4


@pytest.mark.parametrize("save", [save_safetensors, save_bin_shards])
@pytest.mark.parametrize("has_tower", [False, True])
def test_the_original_layout(save: Callable[[Path, Weights], None], has_tower: bool, tmp_path: Path) -> None:
    model = tiny_vlm()
    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, tower=tower, save=save, has_tower=has_tower)
    converted = from_llava(folder, OPTIONS)
    assert any("pad" in note for note in converted.notes)
    write_converted(converted, tmp_path / "ours")
    loaded, processor = moe_lvlm.load(tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(model))
    assert processor.tokenizer.eos_token == "</s>"


def test_a_tower_that_was_trained_goes_before_the_folder(tmp_path: Path) -> None:
    model, other = tiny_vlm(), tiny_vlm(seed=1)
    tower = write_tower(tmp_path / "clip", other)
    folder = write_original(tmp_path / "llava", model, tower=tower, has_tower=True)
    converted = from_llava(folder, OPTIONS)
    name = "model.vision_tower.embeddings.class_embedding"
    assert torch.equal(converted.weights.read(name), model.state_dict()[name])


def test_mistral_in_the_original_layout(tmp_path: Path) -> None:
    model = tiny_vlm("mistral")
    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, family="llava_mistral", tower=tower)
    write_converted(from_llava(folder, OPTIONS), tmp_path / "ours")
    assert torch.equal(logits(moe_lvlm.load(tmp_path / "ours")[0]), logits(model))


def test_the_image_token_is_added_where_the_vocabulary_is_full(tmp_path: Path) -> None:
    """14 words and a vocabulary of 14: the image token is the 15th, the tables grow to 64 rows."""
    model = tiny_vlm()
    size = write_tokenizer(tmp_path / "llava", has_image=False)
    assert size == 14

    def cut(weights: Weights) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:size]

    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, tower=tower, change=cut, vocab_size=size)
    converted = from_llava(folder, OriginalOptions(seed=3))
    write_converted(converted, tmp_path / "ours")
    loaded, processor = moe_lvlm.load(tmp_path / "ours")
    assert (processor.image_token_id, loaded.config.image_token_index) == (size, size)
    head, known = loaded.lm_head.weight, model.lm_head.weight
    assert head.shape == (64, 32)
    assert torch.equal(head[:size], known[:size])
    embeddings = loaded.get_input_embeddings().weight
    assert torch.equal(embeddings[:size], model.get_input_embeddings().weight[:size])
    # N(0, initializer_range = 0.2), 50 x 32 numbers each, not the same in both tables
    for table in (head, embeddings):
        assert 0.18 < table[size:].std() < 0.22
        assert table[size:].mean().abs() < 0.02
    assert not torch.equal(head[size:], embeddings[size:])
    again = from_llava(folder, OriginalOptions(seed=3)).weights.read("lm_head.weight")
    assert torch.equal(again, head)
    assert not torch.equal(from_llava(folder, OriginalOptions(seed=4)).weights.read("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_mpt"}, r"model_type 'llava_mpt'; allowed: llava, llava_llama, llava_mistral"),
        ({"mm_projector_type": "linear"}, "mm_projector_type: 'linear'; allowed: mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: 'cls'; allowed: patch, cls_patch"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_vision_tower": "openai/clip"}, "vision tower 'openai/clip' .* is no folder here"),
        ({"moe": {"num_experts": [4]}}, "moe-llava"),
        (
            {"intermediate_size": 40},
            r"misshapen: model\.language_model\.layers\.0\.mlp\.gate_proj\.weight is \[48, 32\]",
        ),
        ({"num_hidden_layers": 4}, r"9 missing: model\.language_model\.layers\.3"),
        ({"num_hidden_layers": 2}, r"9 unexpected: model\.layers\.2"),
    ],
)
def test_what_is_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    model = tiny_vlm()
    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, tower=tower, **fields)
    with pytest.raises(ValueError, match=message):
        from_llava(folder, OPTIONS)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        from_llava(tmp_path / "nowhere", OPTIONS)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        from_llava(tmp_path, OPTIONS)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="it is no LLaVA"):
        from_llava(tmp_path, OPTIONS)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        from_llava(tmp_path, OPTIONS)


def test_two_names_for_one_place(tmp_path: Path) -> None:
    model = tiny_vlm()

    def twice(weights: Weights) -> None:
        weights["model.mm_projector.image_spatial_proj.0.bias"] = weights["model.mm_projector.0.bias"]

    folder = write_original(tmp_path / "llava", model, tower=write_tower(tmp_path / "clip", model), change=twice)
    with pytest.raises(ValueError, match=r"are both model\.multi_modal_projector\.linear_1\.bias"):
        from_llava(folder, OPTIONS)
