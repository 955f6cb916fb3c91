"""A run's folder as training leaves it, without training: a tiny sparse model whose experts differ, in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.models.build import build_dense
from moe_lvlm.models.upcycle import upcycle
from tests.tiny_models import shake
from tests.tiny_run import tiny_recipe, write_run_inputs

SCORES = {"color": {"accuracy": 0.5, "majority": 0.25, "n": 4}}


def write_trained_run(folder: Path, *, is_sparse: bool = True, **changes: Any) -> Path:
    """The run's folder, below `folder`, which also holds its data. changes: top-level keys of the recipe."""
    changes = {"evaluation": {"tasks": [{"name": "colors", "path": "train.json", "max_new_tokens": 3}]}} | changes
    write_run_inputs(folder, **changes)
    recipe = tiny_recipe(folder, **changes)
    model, processor = build_dense(ModelSettings.model_validate(recipe["model"]), seed=3)
    if is_sparse:
        upcycle(model, MoEConfig.model_validate(recipe["moe"]))
    shake(model, scale=0.3, seed=1)  # large enough for routing to be sure of itself, and for logits to differ
    run = Path(recipe["output_dir"])
    processor.save_pretrained(run / "processor")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "metrics.json").write_text(json.dumps({"eval": SCORES}))
    (run / "environment.txt").write_text("command: train\npython: 3.11.9\ntorch: 2.13.0\n")
    save_checkpoint(
        run / "checkpoints",
        "sparse-000005" if is_sparse else "tune-000003",
        live_model(model),
        config=model.config.to_dict(),
        state={"global_step": 8, "tokens": 1234},
        rng={},
        ranks=SingleRank(),
        log=print,
    )
    return run
