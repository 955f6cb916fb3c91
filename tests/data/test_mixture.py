from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import xxhash
from PIL import Image
from pydantic import ValidationError
from transformers import LlavaProcessor

from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.moe import ClusterRouterSettings, MoEConfig
from moe_lvlm.config.recipe import DataSettings, SourceSettings, TaskTypeSettings
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.clustering import dataset_table, fit_clusters
from moe_lvlm.data.draws import draw_number
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.mixture import (
    Draw,
    MixtureDataset,
    Source,
    build_dataset,
    draws_by_ratio,
    draws_by_weight,
    needed_data,
    open_records,
    resolve_path,
)
from moe_lvlm.data.sample import SampleBuilder

from .conftest import MakeBuilder, MakeSource, conversation, num_image_tokens
from .letters import encode


def records(count: int) -> list[object]:
    return [{"id": f"r{i}", "conversations": conversation(f"q {i}", f"a {i}")} for i in range(count)]


@pytest.fixture
def sources(make_source: MakeSource) -> list[Source]:
    return [make_source(records(count), name) for name, count in (("a", 10), ("b", 4), ("c", 3))]


def mixed(sources: list[Source], weights: list[float], builder: SampleBuilder, seed: int) -> MixtureDataset:
    return MixtureDataset(sources, draws_by_weight(sources, weights), builder, seed=seed)


def drawn(dataset: MixtureDataset, epoch: int) -> Counter[tuple[str, int]]:
    places = (dataset.locate(Draw(epoch, position)) for position in range(len(dataset)))
    return Counter((source.name, index) for source, index in places)


def test_an_epoch_holds_whole_copies_and_a_choice(sources: list[Source], make_builder: MakeBuilder) -> None:
    # 0.3 x 10 = 3, 2.5 x 4 = 10, 1 x 3 = 3
    dataset = mixed(sources, [0.3, 2.5, 1.0], make_builder(), seed=5)
    assert len(dataset) == 3 + 10 + 3
    chosen = set()
    for epoch in range(8):
        counts = drawn(dataset, epoch)
        assert sorted(counts[("a", i)] for i in range(10)) == [0] * 7 + [1] * 3
        assert sorted(counts[("b", i)] for i in range(4)) == [2, 2, 3, 3]
        assert [counts[("c", i)] for i in range(3)] == [1, 1, 1]
        chosen.add(tuple(i for i in range(10) if counts[("a", i)]))
    assert len(chosen) > 4  # anew each epoch: of 120 choices, 8 drawn


def test_the_choice_is_a_function_of_seed_and_epoch(sources: list[Source], make_builder: MakeBuilder) -> None:
    make = lambda seed: mixed(sources, [0.3, 2.5, 1.0], make_builder(), seed=seed)  # noqa: E731
    forward, backward = make(5), make(5)
    assert [drawn(forward, e) for e in range(6)] == [drawn(backward, e) for e in reversed(range(6))][::-1]
    assert [drawn(make(5), e) for e in range(6)] != [drawn(make(6), e) for e in range(6)]


def test_samples_come_by_epoch_and_position(sources: list[Source], make_builder: MakeBuilder) -> None:
    dataset = mixed(sources, [1, 1, 1], make_builder(), seed=0)
    assert [dataset[Draw(0, position)].key for position in (0, 9, 10, 16)] == ["a/0", "a/9", "b/0", "c/2"]
    for position in (-1, 17):
        with pytest.raises(IndexError):
            dataset[Draw(0, position)]


def test_a_mixture_that_makes_no_sense_is_refused(sources: list[Source], make_builder: MakeBuilder) -> None:
    builder = make_builder()
    with pytest.raises(ValueError, match="empty"):
        MixtureDataset([], [], builder, seed=0)
    with pytest.raises(ValueError, match="name of its own"):
        MixtureDataset([sources[0], sources[0]], [10, 10], builder, seed=0)
    with pytest.raises(ValueError, match=r"a: weight 0\.01 of 10 .*at least 0\.05"):
        draws_by_weight(sources[:1], [0.01])
    assert draws_by_weight(sources[:1], [0.05]) == [1]
    with pytest.raises(ValueError, match="positive"):
        draws_by_weight(sources[:1], [float("nan")])


def test_ratios_share_out_the_shortest_epoch_that_holds_all(sources: list[Source], make_builder: MakeBuilder) -> None:
    # lengths 10, 4, 3. For 5 : 1 : 2 the second needs 4 rounds: 20, 4, 8 draws; for 7 : 2 : 2 the second 2 rounds
    assert draws_by_ratio(sources, [5, 1, 2]) == [20, 4, 8]
    assert draws_by_ratio(sources, [7, 2, 2]) == [14, 4, 4]
    # only proportions count, and a half goes up: 10, 10 / 4 = 2.5 is 4's own
    assert draws_by_ratio(sources, [0.35, 0.1, 0.1]) == [14, 4, 4]
    assert draws_by_ratio(sources, [1, 1, 1]) == [10, 10, 10]
    dataset = MixtureDataset(sources, draws_by_ratio(sources, [5, 1, 2]), make_builder(), seed=0)
    counts = drawn(dataset, 0)
    assert [counts[("a", i)] for i in range(10)] == [2] * 10
    assert [counts[("b", i)] for i in range(4)] == [1] * 4
    assert sorted(counts[("c", i)] for i in range(3)) == [2, 3, 3]


def test_ratios_of_a_mixture(tmp_path: Path, processor: LlavaProcessor) -> None:
    for name, count in (("one.json", 4), ("two.json", 2)):
        (tmp_path / name).write_text(json.dumps(records(count)))
    settings = DataSettings(image_root=str(tmp_path), max_length=64)
    mixture = (SourceSettings(path="one.json", ratio=1), SourceSettings(path="two.json", ratio=3))
    dataset, _ = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 3)
    assert len(dataset) == 4 + 12
    half = (mixture[0], SourceSettings(path="two.json", weight=3))
    with pytest.raises(ValueError, match=r"data\.mixture: 1 of 2 sources have a ratio; allowed: all of them, or none"):
        build_dataset(settings, half, "chat", processor, num_image_tokens, 3)
    with pytest.raises(ValidationError, match=r"weight: 2\.0 beside ratio: 3\.0"):
        SourceSettings(path="two.json", weight=2, ratio=3)


def test_a_draw_has_a_number_of_its_own(sources: list[Source], make_builder: MakeBuilder) -> None:
    make = lambda seed: mixed(sources, [2.0, 1.0, 1.0], make_builder(), seed=seed)  # noqa: E731
    dataset = make(5)
    numbers = [dataset[Draw(epoch, position)].draw for epoch in range(3) for position in range(len(dataset))]
    assert None not in numbers
    assert len(set(numbers)) == 3 * 27
    assert all(0 <= number < 2**63 for number in numbers if number is not None)
    # of the place alone, whenever and wherever it is drawn
    assert make(5)[Draw(2, 26)].draw == numbers[-1]
    assert make(6)[Draw(2, 26)].draw != numbers[-1]
    # the first 63 of the 64 bits of XXH3 of the text, whatever the machine
    assert numbers[1] == xxhash.xxh3_64(b"5/0/1").intdigest() // 2


def test_answers_and_instructions_are_drawn_anew(tmp_path: Path, processor: LlavaProcessor) -> None:
    fixtures = Path(__file__).parent / "fixtures" / "vqa"
    Image.new("RGB", (20, 20)).save(tmp_path / "COCO_train2014_000000458752.jpg")
    source = SourceSettings(
        source="vqa",
        path=str(fixtures / "v2_OpenEnded_mscoco_train2014_questions.json"),
        annotations=str(fixtures / "v2_mscoco_train2014_annotations.json"),
        instructions=("{QUESTION}", "Q: {QUESTION} A:"),
    )
    settings = DataSettings(image_root=str(tmp_path))
    dataset, _ = build_dataset(settings, [source], "chat", processor, num_image_tokens, 0)
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(40):
        sample = dataset[Draw(epoch, 0)]
        answer = processor.tokenizer.decode(sample.labels[sample.labels != -100]).removesuffix("<|im_end|>")
        words = processor.tokenizer.decode(sample.input_ids[sample.instruction]).strip()
        record = dataset.sources[0].record(0, draw_number(0, epoch, 0))
        assert (f"<image>\n{words}", answer) == (record.turns[0].text, record.turns[1].text)
        seen[words, answer] += 1
    assert {answer for _, answer in seen} == {"net", "netting", "mesh"}
    asked = "What is this photo taken looking through?"
    assert {words for words, _ in seen} == {asked, f"Q: {asked} A:"}


def test_build_dataset_from_settings(tmp_path: Path, processor: LlavaProcessor) -> None:
    (tmp_path / "coco").mkdir()
    for name, count in (("one.json", 4), ("two.json", 2)):
        (tmp_path / name).write_text(json.dumps(records(count)))
    settings = DataSettings(image_root=str(tmp_path), max_length=64)
    mixture = (
        SourceSettings(path="one.json", weight=0.5, image_root="coco"),
        SourceSettings(path=str(tmp_path / "two.json"), name="second"),
    )
    dataset, collator = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 3)
    assert [(source.name, source.image_root) for source in dataset.sources] == [
        ("one", tmp_path / "coco"),
        ("second", tmp_path),
    ]
    assert len(dataset) == 4
    batch = collator([dataset[Draw(0, 2)], dataset[Draw(0, 3)]])
    assert batch["input_ids"].shape[0] == 2

    with pytest.raises(DataFileError, match="none is not a folder"):
        build_dataset(
            settings, [SourceSettings(path="one.json", image_root="none")], "chat", processor, num_image_tokens, 3
        )
    with pytest.raises(DataFileError, match=r"zero\.json: does not exist"):
        build_dataset(settings, [SourceSettings(path="zero.json")], "chat", processor, num_image_tokens, 3)


def test_paths_of_packs_are_resolved() -> None:
    with pytest.raises(ValueError, match="nopack"):
        resolve_path("package:nopack/train.json", "/data")
    with pytest.raises(ValueError, match="nopack"):
        resolve_path("train.json", "package:nopack")
    assert resolve_path("train.json", "/data") == Path("/data/train.json")
    assert resolve_path("/other/train.json", "/data") == Path("/other/train.json")


def test_samples_carry_labels_and_clusters(make_source: MakeSource, processor: LlavaProcessor, tmp_path: Path) -> None:
    asked = ["xxxx", "aaab", "aaaa", "xxxx"]
    make_source([{"conversations": conversation(text, "red", "xxxx", "blue")} for text in asked])
    fit_clusters({"aaaa": 2, "aaab": 1, "xxxx": 1}, encode, encoder="letters", num_clusters=2, seed=0).save(
        tmp_path / "clusters.safetensors"
    )
    rules = (TaskTypeSettings(label=1, instruction="aaaa"), TaskTypeSettings(label=0, dataset="a", instruction="b$"))
    mixture = (SourceSettings(path="a.json"),)
    settings = DataSettings(image_root=str(tmp_path), task_types=rules, clusters="clusters.safetensors", max_length=512)
    dataset, collator = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 0)
    samples = [dataset[Draw(0, position)] for position in range(4)]
    assert [(one.task_label, one.cluster) for one in samples] == [(None, 1), (0, 0), (1, 0), (None, 1)]
    routing = collator(samples)["routing"]
    assert routing.task_N is not None
    assert routing.cluster_N is not None
    assert (routing.task_N.tolist(), routing.cluster_N.tolist()) == ([-1, 0, 1, -1], [1, 0, 0, 1])
    # a prompt's cluster is its conversation's: of the first turn, however many there are
    assert dataset.sources[0].prompt(0, dataset.builder).cluster == 1
    assert dataset.sources[0].prompt(1, dataset.builder).cluster == 0

    plain, collator = build_dataset(
        settings.model_copy(update={"task_types": (), "clusters": None}),
        mixture,
        "chat",
        processor,
        num_image_tokens,
        0,
    )
    sample = plain[Draw(0, 0)]
    assert (sample.task_label, sample.cluster) == (None, None)
    assert collator([sample])["routing"].task_N is None

    with pytest.raises(DataFileError, match=r"none\.safetensors: no such file"):
        build_dataset(
            settings.model_copy(update={"clusters": "none.safetensors"}),
            mixture,
            "chat",
            processor,
            num_image_tokens,
            0,
        )


def test_samples_know_their_dataset(make_source: MakeSource, processor: LlavaProcessor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_source([{"conversations": conversation(text, "red")} for text in ("aaaa", "xxxx")], name)
    mixture = (SourceSettings(path="a.json", name="first"), SourceSettings(path="b.json", weight=0.5))
    settings = DataSettings(image_root=str(tmp_path), max_length=512)
    dataset, collator = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 0)
    samples = [dataset[Draw(0, position)] for position in (2, 0, 1)]
    assert [one.dataset for one in samples] == ["b", "first", "first"]
    routing = collator(samples)["routing"]
    assert routing.dataset_N is not None
    assert routing.dataset_N.tolist() == [1, 0, 0]
    assert routing.dataset_N.dtype == torch.int64
    assert [source.prompt(0, dataset.builder).dataset_index for source in dataset.sources] == [0, 1]
    # from no dataset of the mixture
    other = Source("other", dataset.sources[0].records, tmp_path)
    assert other.prompt(0, dataset.builder).dataset_index is None
    assert collator([samples[0], other.sample(0, dataset.builder)])["routing"].dataset_N is None


def test_what_is_from_no_dataset_goes_to_the_nearest(
    make_source: MakeSource, processor: LlavaProcessor, tmp_path: Path
) -> None:
    for name, text in (("a", "aaaa"), ("b", "xxxx"), ("c", "xxax")):
        make_source([{"conversations": conversation(text, "red")}], name)
    counts = {"a": {"aaaa": 1}, "b": {"xxxx": 1}}
    dataset_table(counts, encode, encoder="letters", assigned=["xxax"]).save(tmp_path / "datasets.safetensors")
    settings = DataSettings(image_root=str(tmp_path), clusters="datasets.safetensors", max_length=512)
    mixture = (SourceSettings(path="a.json"), SourceSettings(path="b.json"))
    dataset, _ = build_dataset(settings, mixture, "chat", processor, num_image_tokens, 0)
    other = open_records(RecordsSettings(path="c.json"), str(tmp_path))
    assert other.prompt(0, dataset.builder).dataset_index == 1
    assert dataset.sources[0].prompt(0, dataset.builder).dataset_index == 0
    with pytest.raises(ValueError, match="a table of the datasets a, b, but the mixture has b, a"):
        build_dataset(settings, mixture[::-1], "chat", processor, num_image_tokens, 0)


def test_the_table_is_left_out_where_no_router_reads_it() -> None:
    settings = DataSettings(clusters="clusters.safetensors", max_length=99)
    for gating, is_read in (("cluster", True), ("dataset", True), ("sentence", False), ("token", False)):
        adapter = MoCLESettings.model_validate({"gating": gating})
        assert (needed_data(settings, MoEConfig(), adapter) == settings) == is_read
    assert needed_data(settings, None, LoRASettings()).clusters is None
    assert needed_data(settings, MoEConfig(router=ClusterRouterSettings())) == settings
    for moe in (None, MoEConfig()):
        assert needed_data(settings, moe) == DataSettings(max_length=99)
