"""A recipe's tower by itself, which caches are its own, and runs that train from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.testing import assert_close

import moe_lvlm
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.feature_images import find_images, stage_sources
from moe_lvlm.data.feature_shards import ShardImage, write_index, write_shard
from moe_lvlm.data.features import FeatureCache
from moe_lvlm.data.images import load_image
from moe_lvlm.data.mixture import open_records
from moe_lvlm.data.sample import process_image
from moe_lvlm.models.build import build_dense
from moe_lvlm.training.build import build_stage_model, run_processor
from moe_lvlm.training.dry_run import describe
from moe_lvlm.training.features import check_feature_cache, feature_choice, load_frozen_tower, vision_tower
from moe_lvlm.training.plan import check_data
from tests.tiny_models import tiny_llava
from tests.tiny_run import tiny_recipe, write_qmoe_inputs, write_run_inputs, write_words
from tests.training.launching import Server, events

STEPS = 3
QFORMER = {
    "kind": "qformer", "num_queries": 5, "dropout": 0.0,
    "qformer": {
        "from_config": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "vocab_size": 20, "max_position_embeddings": 16,
        }
    },
}  # fmt: skip


def make_cache(recipe: Recipe, folder: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    """A cache of a recipe's images, in batches of two as its micro-batches are."""
    processor = run_processor(recipe)
    tower = load_frozen_tower(recipe)
    base = Path(recipe.data.image_root)
    images, _ = find_images([open_records(one, str(base)) for one in stage_sources(recipe, None)], base)
    images = [image for image in images if image.key not in leave_out]
    folder.mkdir()
    for start in range(0, len(images), 2):
        some = images[start : start + 2]
        pixels = torch.stack([process_image(processor, load_image(one.root, one.path)) for one in some])
        named = [ShardImage(one.key, (one.root / one.path).stat().st_size) for one in some]
        write_shard(folder, named, tower.features(pixels), fingerprint=tower.fingerprint(processor))
    write_index(folder)
    return folder


def recipe_of(folder: Path, **changes: Any) -> Path:
    """The tiny recipe of one dense stage and a sparse one, three steps each."""
    path = write_run_inputs(folder)
    recipe = tiny_recipe(folder)
    for stage in recipe["stages"]:
        stage["steps"] = STEPS
    recipe["train"]["checkpoint"]["every"] = 0
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def with_cache(path: Path, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(path, [f"data.feature_cache={folder}", *overrides])


# The origins of a tower.


def of_parts(folder: Path) -> Path:
    return recipe_of(folder)


def of_pretrained_parts(folder: Path) -> Path:
    path = recipe_of(folder)
    made, processor = build_dense(load_recipe(path).model, seed=3)
    made.model.vision_tower.save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["vision_tower"] = {"from_pretrained": str(folder / "tower"), "feature_layer": -1}
    path.write_text(yaml.safe_dump(recipe))
    return path


def _whole(folder: Path, save: Callable[[Path, Path], None]) -> Path:
    path = recipe_of(folder)
    save(path, folder / "model")
    recipe = yaml.safe_load(path.read_text())
    recipe["model"] = {"from_pretrained": str(folder / "model")}
    path.write_text(yaml.safe_dump(recipe))
    return path


def of_stock_llava(folder: Path) -> Path:
    def save(path: Path, target: Path) -> None:
        model, processor = build_dense(load_recipe(path).model, seed=4)
        stock = tiny_llava()
        config = type(stock.config).from_dict(model.config.to_dict() | {"model_type": "llava"})
        stock = type(stock)(config)
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained(target)
        processor.save_pretrained(target)

    return _whole(folder, save)


def of_our_llava(folder: Path) -> Path:
    def save(path: Path, target: Path) -> None:
        model, processor = build_dense(load_recipe(path).model, seed=5)
        model.save_pretrained(target)
        processor.save_pretrained(target)

    return _whole(folder, save)


def of_instructblip(folder: Path) -> Path:
    return write_qmoe_inputs(folder)


ORIGINS = {
    "parts, drawn": of_parts, "parts, pretrained": of_pretrained_parts, "transformers' LLaVA": of_stock_llava,
    "our LLaVA": of_our_llava, "InstructBLIP": of_instructblip,
}  # fmt: skip


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group, without which no stage's model is built."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("origin", list(ORIGINS))
def test_the_tower_is_the_runs(tmp_path: Path, origin: str, precision: str) -> None:
    recipe = load_recipe(ORIGINS[origin](tmp_path), [f"train.precision={precision}"])
    expected = build_stage_model(recipe, 0, None, zero_stage=2, device=torch.device("cpu"))
    tower = load_frozen_tower(recipe)
    assert (tower.layer, tower.select) == feature_choice(expected.config)
    weights = dict(vision_tower(expected).named_parameters())
    found = dict(tower.module.named_parameters())
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name
        assert found[name].dtype == weight.dtype
    assert not tower.module.training

    # and its features are what this model's connector reads
    pixels = torch.randn(2, 3, *(2 * [tower.module.config.image_size])).to(weight.dtype)
    seen: list[torch.Tensor] = []
    model = expected.train()
    inputs: dict[str, Any] = {}
    if origin == "InstructBLIP":
        inputs = {"qformer_input_ids": torch.ones(2, 2, dtype=torch.int64)}
        model.qformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        model.eval()
    else:
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.get_image_features(pixels, **inputs)
    assert torch.equal(tower.features(pixels), seen[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "vision tower: weights is '[0-9a-f]{32}' in the cache, '[0-9a-f]{32}' in the recipe"),
        ({"train.precision": "bf16"}, "vision tower: precision is 'torch.float32' in the cache, 'torch.bfloat16'"),
        ({"model.vision_tower.feature_layer": -1}, "feature_layer is -2 in the cache, -1 in the recipe; allowed"),
        (
            {"model.vision_tower.feature_select": "full"},
            "feature_select is 'default' in the cache, 'full' in the recipe",
        ),
        ({"model.vision_tower.from_config.hidden_act": "relu"}, "hidden_act is 'quick_gelu' in the cache, 'relu'"),
        ({"model.image_processor": "processor"}, r"image processor: image_mean is \[0\.48.* in the cache, \[0\.5, 0"),
    ],
)
def test_another_recipes_cache_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = recipe_of(tmp_path)
    cache = make_cache(load_recipe(path), tmp_path / "cache")
    check_feature_cache(with_cache(path, cache), run_processor(load_recipe(path)))
    processor = run_processor(load_recipe(path))
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.image_processor.save_pretrained(tmp_path / "processor")
    changes = {key: str(tmp_path / value) if value == "processor" else value for key, value in change.items()}
    recipe = with_cache(path, cache, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    with pytest.raises(ValueError, match=f"data.feature_cache: {cache} was made with another .*{message}"):
        check_data(recipe, run_processor(recipe))


@pytest.mark.parametrize("train", [["vision_tower"], ["connector", "re:vision_tower.*layers.1"]])
def test_a_trained_tower_is_refused(tmp_path: Path, train: list[str]) -> None:
    path = recipe_of(tmp_path)
    cache = make_cache(load_recipe(path), tmp_path / "cache")
    recipe = with_cache(path, cache, f"stages.1.train={json.dumps(train)}")
    with pytest.raises(ValueError, match=r"stage sparse: train: .* trains the vision tower .*; allowed: parts without"):
        describe(recipe)
    describe(recipe.model_copy(update={"data": load_recipe(path).data}))


def test_a_folder_without_a_cache_shows_before_the_first_stage(tmp_path: Path) -> None:
    recipe = with_cache(recipe_of(tmp_path), tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"nothing/index\.json: no such file; allowed: a folder that tools/cache_features"
    ):
        check_data(recipe, run_processor(recipe))


def train(server: Server, path: Path, folder: Path, world: int, *overrides: str) -> list[dict[str, Any]]:
    command = ["train", str(path), f"output_dir={folder}", *overrides]
    server.run(command, world=world)
    return [values for _, values in sorted(events(folder).steps().items())]


PACKED = ("data.batching=packed", "data.balance=true", "data.num_workers=1")
RUNS = {"one process": (1, ()), "two processes": (2, ()), "packed": (2, PACKED)}


@pytest.mark.distributed
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_a_run_from_a_cache_is_the_run_from_images(server: Server, tmp_path: Path, connector: str) -> None:
    changes: dict[str, Any] = {}
    if connector == "qformer":
        write_words(tmp_path / "words")
        tokenizer = {"tokenizer": str(tmp_path / "words")}
        changes["model"] = tiny_recipe(tmp_path)["model"] | {"connector": QFORMER | tokenizer}
    path = recipe_of(tmp_path, **changes)
    cache = make_cache(load_recipe(path), tmp_path / "cache")
    for name, (world, overrides) in RUNS.items():
        plain = train(server, path, tmp_path / "plain" / name, world, *overrides)
        cached = train(server, path, tmp_path / "cached" / name, world, *overrides, f"data.feature_cache={cache}")
        assert len(cached) == len(plain) == 2 * STEPS
        for one, other in zip(cached, plain, strict=True):
            assert (one["stage"], one["step"], one["tokens"]) == (other["stage"], other["step"], other["tokens"])
            assert_close(one["loss"], other["loss"], rtol=1e-6, atol=1e-6)
            assert_close(one["grad_norm"], other["grad_norm"], rtol=1e-5, atol=1e-6)
        # what was trained is the same, and the tower is saved as always
        found, expected = (
            dict(moe_lvlm.load(tmp_path / kind / name)[0].named_parameters()) for kind in ("cached", "plain")
        )
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            assert_close(found[weight], value, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.mark.distributed
def test_bad_samples_name_the_image(server: Server, tmp_path: Path) -> None:
    path = recipe_of(tmp_path)
    recipe = load_recipe(path)
    cache = make_cache(recipe, tmp_path / "cache", leave_out=("images/1.png",))
    assert len(FeatureCache(cache, base=tmp_path)) == 31
    overrides = ("data.bad_sample_limit=1", f"data.feature_cache={cache}", "stages.0.steps=10")
    train(server, path, tmp_path / "out", 2, *overrides)
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad
    assert all("image 'images/1.png' is not in the feature cache" in one["reason"] for one in bad)
