"""Runs with trained adapters, without training: a LLaVA from parts, from a stock folder, or an InstructBLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel

from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.config.adapter import read_adapter
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.build import build_dense, build_empty, config_of, is_plain_llava, load_plain_llava, open_weights
from moe_lvlm.models.load import read_processor
from moe_lvlm.models.processor import Processor
from moe_lvlm.models.weights import load_weights
from tests.adapters.problems import shake_adapters
from tests.tiny_models import shake, tiny_text_config
from tests.tiny_run import tiny_recipe, write_data, write_instructblip, write_tokenizer

WIDTH, NUM_CLUSTERS = 6, 4
CHECKPOINT = "adapt-000005"


def mocle_fields(**fields: Any) -> dict[str, Any]:
    """Three experts of rank 2 and a universal one, four clusters, gates that are not sure of themselves."""
    defaults = {"kind": "mocle", "rank": 2, "alpha": 3.0, "num_experts": 3, "num_clusters": NUM_CLUSTERS}
    return defaults | {"embedding_width": WIDTH, "temperature": 0.7, "target_modules": ["q_proj", "v_proj"]} | fields


def write_table(path: Path, *, num_clusters: int = NUM_CLUSTERS, datasets: tuple[str, ...] | None = None) -> None:
    """A table of clusters that knows no instruction."""
    generator = np.random.default_rng(0)
    ClusterTable(
        centres_KW=generator.normal(size=(num_clusters, WIDTH)).astype(np.float32),
        hashes_I=np.empty(0, np.uint64),
        ids_I=np.empty(0, np.int32),
        probe_W=np.ones(WIDTH, np.float32),
        encoder="some/encoder",
        seed=0,
        datasets=datasets,
    ).save(path)


def write_adapted_run(
    folder: Path,
    adapter: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    family: str = "llama",
    trains: tuple[str, ...] = ("connector", "adapter"),
    data: dict[str, Any] | None = None,
    tie: bool = False,
) -> Path:
    """The run's folder below `folder`. model: keys of the recipe's `model`; None is a LLaVA from parts around a language
    model of this family. data: more keys of the recipe's `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    write_data(folder, count=4)
    recipe = tiny_recipe(folder)
    text = tiny_text_config(family, vocab_size=32, tie_word_embeddings=tie).to_dict()
    parts = recipe["model"] | {"language_model": {"from_config": text}}
    stage = recipe["stages"][0] | {"name": "adapt", "train": list(trains), "adapt": True}
    recipe |= {"model": (model or parts) | {"adapter": adapter}, "stages": [stage]}
    recipe["data"] |= data or {}
    if model is not None and "instructblip" in str(model["from_pretrained"]):
        recipe["data"]["template"] = "instruct"
    settings = ModelSettings.model_validate(recipe["model"])
    built, processor = _build(settings)
    if "connector" in trains:
        shake(_connector(built), scale=0.3, seed=2)
    adapt(built, read_adapter(adapter), seed=3)
    shake_adapters(built, seed=1)
    run = Path(recipe["output_dir"])
    processor.save_pretrained(run / "processor")
    (run / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    save_checkpoint(
        run / "checkpoints",
        CHECKPOINT,
        live_model(built),
        config=built.config.to_dict(),
        state={"global_step": 5, "tokens": 99},
        rng={},
        ranks=SingleRank(),
        log=print,
    )
    return run


def write_adapted_blip(folder: Path, adapter: dict[str, Any], text: str = "llama", **options: Any) -> Path:
    """The same from an InstructBLIP around a language model of `BLIP_TEXT_CONFIGS`."""
    write_instructblip(folder / f"instructblip-{text}", text)
    model = {"from_pretrained": str(folder / f"instructblip-{text}")}
    return write_adapted_run(folder, adapter, model=model, **options)


def _build(settings: ModelSettings) -> tuple[PreTrainedModel, Processor]:
    if settings.from_pretrained is None:
        model, processor = build_dense(settings, seed=3)
        shake(model, scale=0.1, seed=1)
        return model, processor
    folder = Path(settings.from_pretrained)
    processor = read_processor(folder)
    if is_plain_llava(folder):
        return load_plain_llava(folder, dtype=torch.float32), processor
    model = build_empty(config_of(folder))
    load_weights(model, open_weights(folder))
    return model, processor


def _connector(model: PreTrainedModel) -> torch.nn.Module:
    return model.qformer if hasattr(model, "qformer") else model.model.multi_modal_projector
