"""Features on disk: what is read, by whose name, and which folders and images are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from moe_lvlm.config.recipe import DataSettings, Recipe, SourceSettings
from moe_lvlm.data import features as features_module
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.errors import BadRecordError, DataFileError, RecordFault
from moe_lvlm.data.feature_images import find_images, stage_sources
from moe_lvlm.data.feature_shards import ShardImage, read_shards, write_index, write_shard
from moe_lvlm.data.features import FeatureCache, differences, image_key
from moe_lvlm.data.mixture import Draw, build_dataset
from tests.data import families
from tests.data.conftest import MakeSource, conversation, num_image_tokens
from tests.tiny_run import tiny_recipe

MADE = {"vision tower: weights": "abc", "feature_layer": -2}
SHAPE = (5, 3)  # other than the 4 tokens that the processor's sizes would give


def features(value: float, count: int = 1) -> Tensor:
    """Images whose features are value, value + 1, ... throughout."""
    return torch.arange(count, dtype=torch.float32)[:, None, None] + torch.full((count, *SHAPE), value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Images a.png, sub/b.png, c.png and lost.png, which the cache in `cache` has not."""
    (tmp_path / "sub").mkdir()
    for place, name in enumerate(("a.png", "sub/b.png", "c.png", "lost.png")):
        Image.new("RGB", (8 + place, 8), (255, 0, 0)).save(tmp_path / name)
    write(tmp_path, [("a.png", "sub/b.png"), ("c.png",)])
    return tmp_path


def write(base: Path, shards: list[tuple[str, ...]]) -> Path:
    folder = base / "cache"
    folder.mkdir(exist_ok=True)
    value = 0.0
    for names in shards:
        images = [ShardImage(name, (base / name).stat().st_size) for name in names]
        write_shard(folder, images, features(value, len(names)), fingerprint=MADE)
        value += len(names)
    write_index(folder)
    return folder


def test_each_image_has_its_own(base: Path) -> None:
    cache = FeatureCache(base / "cache", base=base)
    assert (len(cache), cache.shape, cache.fingerprint) == (3, SHAPE, MADE)
    found = [cache.read(root, path) for root, path in ((base, "c.png"), (base, "a.png"), (base / "sub", "b.png"))]
    for one, value in zip(found, (2, 0, 1), strict=True):
        assert torch.equal(one, features(value)[0])
    # alone, not a view of its shard
    assert found[0].untyped_storage().nbytes() == 4 * SHAPE[0] * SHAPE[1]


def test_few_shards_stay_open(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_OPEN_SHARDS", 1)
    cache = FeatureCache(base / "cache", base=base)
    for _ in range(2):
        assert [float(cache.read(base, name)[0, 0]) for name in ("a.png", "c.png", "sub/b.png")] == [0, 2, 1]
        assert len(cache._open) == 1


def test_folder_and_images_move_together(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    base.rename(moved)
    cache = FeatureCache(moved / "cache", base=moved)
    assert torch.equal(cache.read(moved / "sub", "b.png"), features(1)[0])


@pytest.mark.parametrize(
    ("root", "path", "key"),
    [
        ("data", "a.png", "a.png"),
        ("data/sub", "./b//c.png", "sub/b/c.png"),
        ("/elsewhere", "a.png", "/elsewhere/a.png"),
        ("data2", "a.png", "data2/a.png"),
    ],
)
def test_what_an_image_is_called(root: str, path: str, key: str) -> None:
    assert image_key(Path("data"), Path(root), path) == key


def test_what_is_not_there_is_a_fault_of_the_record(base: Path) -> None:
    cache = FeatureCache(base / "cache", base=base)
    with pytest.raises(
        RecordFault, match=r"'lost.png' is not in the feature cache .*cache \(looked for as 'lost.png'\)"
    ):
        cache.read(base, "lost.png")
    with pytest.raises(RecordFault, match="leaves the image root"):
        cache.read(base / "sub", "../a.png")
    with pytest.raises(RecordFault, match=r"'none\.png' is not a file"):
        cache.read(base, "none.png")
    size = (base / "a.png").stat().st_size
    Image.new("RGB", (90, 90)).save(base / "a.png")
    with pytest.raises(RecordFault, match=rf"'a.png' has \d+ bytes, the one in the feature cache .* had {size}"):
        cache.read(base, "a.png")


Damage = Callable[[Path], Any]


def change_index(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "index.json").unlink(),
            "index.json: no such file; allowed: a folder that tools/cache",
        ),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json: cannot be read as JSON"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"format_version \[\]; allowed: 1"),
        (change_index(format_version=2), "format_version 2; allowed: 1"),
        (change_index(shape=[5]), r"it holds \['dtype', 'fingerprint'.*; allowed: fingerprint"),
        (change_index(shards={"../x": []}), "allowed: fingerprint"),
        (change_index(shards={"features-0.safetensors": []}), r"1 shards .* missing \(features-0.safetensors\)"),
    ],
)
def test_a_folder_that_is_no_cache(base: Path, damage: Damage, message: str) -> None:
    damage(base / "cache")
    with pytest.raises(DataFileError, match=message):
        FeatureCache(base / "cache", base=base)


def test_a_damaged_shard_stops_the_run(base: Path) -> None:
    cache = FeatureCache(base / "cache", base=base)
    for shard in (base / "cache").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataFileError, match="no shard of features"):
        cache.read(base, "a.png")
    with pytest.raises(DataFileError, match="remove it, and the same call makes it anew"):
        read_shards(base / "cache")
    change_index(shape=[4, 3])(write(base, [("a.png", "sub/b.png"), ("c.png",)]))
    with pytest.raises(DataFileError, match=r"is \[2, 5, 3\], index.json says \[2, 4, 3\]"):
        FeatureCache(base / "cache", base=base).read(base, "a.png")


def test_shards_of_two_towers_make_no_index(base: Path) -> None:
    image = ShardImage("lost.png", 1)
    write_shard(base / "cache", [image], features(0), fingerprint=MADE | {"feature_layer": -1})
    with pytest.raises(DataFileError, match=r"feature_layer is -[12] in the cache, -[12] in the recipe"):
        write_index(base / "cache")


def test_differences_name_both_values() -> None:
    assert differences(MADE, dict(MADE)) == []
    assert differences(MADE, {"feature_layer": -1, "feature_select": "full", "vision tower: weights": "abc"}) == [
        "feature_layer is -2 in the cache, -1 in the recipe",
        "feature_select is None in the cache, 'full' in the recipe",
    ]


def test_images_that_records_share_are_found_once(make_source: MakeSource, tmp_path: Path) -> None:
    qa, two = conversation("<image> q", "a"), conversation("<image> <image> q", "a")
    first = make_source(
        [{"image": "wide.png", "conversations": qa}, {}, {"image": ["wide.png", "red.png"], "conversations": two}]
    )
    second = make_source([{"image": "red.png", "conversations": qa}, {"conversations": conversation("q", "a")}], "b")
    seen: list[int] = []
    images, num_bad = find_images([first, second], tmp_path, seen.append)
    assert [image.key for image in images] == ["wide.png", "red.png"]
    assert (num_bad, sum(seen)) == (1, 5)


def test_sources_of_stages(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["stages"][1]["mixture"] = [{"path": "train.json", "weight": 2.0}, {"path": "more.json"}]
    made = Recipe.model_validate(recipe, strict=False)
    assert [source.path for source in stage_sources(made, None)] == ["train.json", "more.json"]
    assert [source.path for source in stage_sources(made, "tune")] == ["train.json"]
    with pytest.raises(ValueError, match="sparze: no stage of recipe tiny, did you mean 'sparse'"):
        stage_sources(made, "sparze")


def records(path: Path) -> None:
    names = (["a.png"], [], ["sub/b.png", "c.png"], ["lost.png"])
    turns = [conversation("<image> " * len(images) + "what is it?", "a cat") for images in names]
    path.write_text(json.dumps([{"image": i, "conversations": t} if i else {"conversations": t} for i, t in zip(names, turns, strict=True)]))  # fmt: skip


def test_samples_and_batches_carry_features(
    base: Path, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    records(base / "records.json")
    mixture = [SourceSettings(path="records.json")]
    plain, _ = build_dataset(DataSettings(image_root=str(base)), mixture, "chat", processor, num_image_tokens, 0)
    settings = DataSettings(image_root=str(base), feature_cache="cache")
    dataset, collator = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 0)
    expected = [plain[Draw(0, place)] for place in range(3)]
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    samples = [dataset[Draw(0, place)] for place in range(3)]
    assert [sample.image_tokens for sample in samples] == [(5,), (), (5, 5)]
    for sample, other, count in zip(samples, expected, (1, 0, 2), strict=True):
        assert sample.pixel_values is None
        # the same words, around 5 tokens an image in place of 4
        image = processor.image_token_id
        assert (
            sample.input_ids[sample.input_ids != image].tolist() == other.input_ids[other.input_ids != image].tolist()
        )
        assert int((sample.input_ids == image).sum()) == 5 * count
    with pytest.raises(BadRecordError, match=r"record 3.*image 'lost.png' is not in the feature cache"):
        dataset[Draw(0, 3)]

    batch = collator(samples)
    assert "pixel_values" not in batch
    assert torch.equal(batch["image_features"], features(0, 3))
    # without images, and without any sample, the batch still says that the tower is not asked
    for few in (samples[1:2], []):
        assert collator(few)["image_features"].shape == (0, *SHAPE)
    assert "image_features" not in Collator.for_processor(processor)(expected)


def test_lengths_count_the_features(base: Path, processor: LlavaProcessor) -> None:
    records(base / "records.json")
    settings = DataSettings(image_root=str(base), feature_cache="cache")
    dataset, _ = build_dataset(settings, [SourceSettings(path="records.json")], "chat", processor, num_image_tokens, 0)
    for place in range(3):
        assert dataset.sources[0].length(place, dataset.builder) == len(dataset[Draw(0, place)].input_ids)


def test_a_q_former_makes_as_many_tokens_as_it_has_queries(base: Path) -> None:
    records(base / "records.json")
    processor = families.processor(families.word_level())
    settings = DataSettings(image_root=str(base), feature_cache="cache", template="instruct")
    dataset, collator = build_dataset(
        settings, [SourceSettings(path="records.json")], "instruct", processor, families.num_queries, 0
    )
    samples = [dataset[Draw(0, place)] for place in (2, 1)]
    assert samples[0].image_tokens == (families.NUM_QUERIES,) * 2
    batch = collator(samples)
    assert batch["image_features"].shape == (2, *SHAPE)
    assert batch["qformer_input_ids"].shape[0] == 2
    assert "qformer_input_ids" not in collator(samples[1:])


def test_prompts_take_images_as_always(base: Path, processor: LlavaProcessor) -> None:
    records(base / "records.json")
    settings = DataSettings(image_root=str(base), feature_cache="cache")
    dataset, _ = build_dataset(settings, [SourceSettings(path="records.json")], "chat", processor, num_image_tokens, 0)
    prompt = dataset.sources[0].prompt(0, dataset.builder)
    assert prompt.image_tokens == (4,)
    assert prompt.pixel_values is not None
