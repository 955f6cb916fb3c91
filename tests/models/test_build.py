"""Models that are built from configurations."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.models.build import build_dense, build_empty
from tests.tiny_run import tiny_recipe, write_tokenizer


def test_low_precision_is_for_parameters(tmp_path: Path) -> None:
    """Buffers are those of a model that is read from files: a resumed run goes on with the same ones."""
    write_tokenizer(tmp_path / "tokenizer")
    settings = ModelSettings.model_validate(tiny_recipe(tmp_path)["model"])
    low, _ = build_dense(settings, seed=0, dtype=torch.bfloat16)
    full, _ = build_dense(settings, seed=0)
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, full.get_parameter(name).to(torch.bfloat16)), name
        assert parameter.requires_grad == full.get_parameter(name).requires_grad
    expected = dict(build_empty(low.config).named_buffers())
    assert expected["model.language_model.rotary_emb.inv_freq"].dtype == torch.float32
    for name, buffer in low.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name].to(buffer.device)), name
