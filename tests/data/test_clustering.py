"""Fitting clusters: groups that are plain to see, against k-means over every record, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moe_lvlm.config.recipe import Recipe, SourceSettings
from moe_lvlm.data import clustering
from moe_lvlm.data.clustering import (
    cluster_index,
    count_instructions,
    dataset_table,
    encode_all,
    fit_clusters,
    recipe_sources,
)
from moe_lvlm.data.published.layout import PublishedLayout
from moe_lvlm.data.published.vqa import GQA

from .conftest import conversation
from .letters import encode

# Three groups by their letters, of 9, 6 and 4 records.
COUNTS = {"aaaa": 5, "aaab": 4, "xxxx": 3, "xxxy": 2, "xxyx": 1, "mmmm": 4}
GROUPS = {"a": 0, "x": 1, "m": 2}


def test_groups_by_hand_the_largest_first() -> None:
    told: list[int] = []
    table = fit_clusters(
        COUNTS, encode, encoder="letters", num_clusters=3, seed=0, assigned=["mm", "aaaa", "yyx"], advance=told.append
    )
    assert {text: table.find(text) for text in COUNTS} == {text: GROUPS[text[0]] for text in COUNTS}
    assert (table.find("mm"), table.find("yyx"), table.find("none")) == (2, 1, None)
    assert sum(told) == 8  # "aaaa" is fitted and assigned, and encoded once
    # each record counts, and what is only assigned does not: the mean of 5 x aaaa and 4 x aaab
    mean = encode(["aaaa"] * 5 + ["aaab"] * 4).mean(axis=0)
    assert np.allclose(table.centres_KW[0], mean, atol=1e-6)
    assert np.allclose(table.centres_KW[1], encode(["xxxx"] * 3 + ["xxxy"] * 2 + ["xxyx"]).mean(axis=0), atol=1e-6)
    assert (table.encoder, table.seed, table.width) == ("letters", 0, 26)


def test_ids_are_those_of_the_nearest_stored_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "LARGE", 10)  # mini-batches, whose own labels are of other centres
    texts = {"".join(chr(97 + int(c)) for c in np.random.default_rng(i).integers(0, 26, 6)): 1 for i in range(300)}
    table = fit_clusters(texts, encode, encoder="letters", num_clusters=12, seed=1)
    for text in texts:
        distances = ((encode([text])[0].astype(float) - table.centres_KW) ** 2).sum(axis=1)
        assert table.find(text) == int(distances.argmin())
    sizes = Counter(table.ids_I.tolist())
    assert sizes[0] == max(sizes.values())


def test_the_same_seed_gives_the_same_table() -> None:
    one, two = (fit_clusters(COUNTS, encode, encoder="letters", num_clusters=2, seed=7) for _ in range(2))
    assert np.array_equal(one.centres_KW, two.centres_KW)
    assert np.array_equal(one.ids_I, two.ids_I)


def test_a_sample_fits_the_centres_and_all_are_assigned() -> None:
    table = fit_clusters(COUNTS, encode, encoder="letters", num_clusters=2, seed=0, sample=2)
    # two instructions drawn, two clusters: the centres are the two themselves
    for centre in table.centres_KW:
        assert any(np.allclose(embedding, centre, atol=1e-6) for embedding in encode(list(COUNTS)))
    assert len(table.ids_I) == len(COUNTS)


def test_too_few_instructions_are_counted_in_the_error() -> None:
    with pytest.raises(ValueError, match="7 clusters of 6 distinct instructions; allowed: 1 to 6"):
        fit_clusters(COUNTS, encode, encoder="letters", num_clusters=7, seed=0)
    with pytest.raises(ValueError, match=r"3 clusters of 2 distinct instructions \(of 6, by the sample\)"):
        fit_clusters(COUNTS, encode, encoder="letters", num_clusters=3, seed=0, sample=2)


def test_two_instructions_with_one_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "instruction_hash", len)
    with pytest.raises(ValueError, match="'aaaa' and 'aaab'"):
        fit_clusters(COUNTS, encode, encoder="letters", num_clusters=2, seed=0)


def test_embeddings_stand_in_the_order_of_the_texts() -> None:
    texts = ["b", "aaa", "", "cc", "a"]
    told: list[int] = []
    assert np.array_equal(encode_all(texts, encode, chunk=2, advance=told.append), encode(texts))
    assert told == [2, 2, 1]
    with pytest.raises(ValueError, match="not finite"):
        encode_all(texts, lambda some: encode(some) * np.nan)


def test_instructions_of_records_are_counted_and_bad_records_left_out() -> None:
    counts: Counter[str] = Counter()
    records = [
        {"image": "a.png", "conversations": conversation("<image>\nWhat?", "x", "Why?", "y")},
        {"conversations": conversation("What?", "x")},
        {"conversations": conversation("no answer")},
        17,
    ]
    assert count_instructions(records, counts) == 2
    assert counts == {"What?": 2}


def recipe(**stages: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {
                "from_pretrained": "x",
                "adapter": {"kind": "lora"} if any(more.get("adapt") for more in stages.values()) else None,
            },
            "data": {"image_root": "/d", "mixture": [{"path": "a.json"}, {"path": "b.json", "weight": 2}]},
            "stages": [
                {"name": name, "train": ["moe"], "steps": 1, "learning_rate": 1, **more}
                for name, more in stages.items()
            ],
        }
    )


def paths(sources: list[SourceSettings]) -> list[str]:
    return [source.path for source in sources]


def test_a_recipes_datasets_are_those_of_its_sparse_stages() -> None:
    sparse = recipe(
        dense={"mixture": [{"path": "c.json"}]},
        up={"upcycle": True},
        more={"mixture": [{"path": "b.json"}, {"path": "/e/d.json"}]},
    )
    assert paths(recipe_sources(sparse)) == ["a.json", "b.json", "/e/d.json"]
    assert paths(recipe_sources(sparse, "dense")) == ["c.json"]
    assert paths(recipe_sources(recipe(one={}))) == ["a.json", "b.json"]
    assert paths(recipe_sources(recipe(one={"mixture": [{"path": "c.json"}]}, two={"adapt": True}))) == [
        "a.json",
        "b.json",
    ]
    with pytest.raises(ValueError, match="stage 'x': not in recipe r; allowed: dense, up, more"):
        recipe_sources(sparse, "x")
    # one file asked in two ways is two datasets
    ways = [{"path": "q.json", "source": "gqa", "instructions": way} for way in ("vqa", "mocle_vqg")]
    assert len(recipe_sources(recipe(one={"mixture": [*ways, ways[0] | {"weight": 3}]}))) == 2


def test_datasets_are_their_instructions_means() -> None:
    counts = {"first": {"aaaa": 3, "aaab": 1}, "second": {"xxxx": 1, "aaaa": 1}}
    table = dataset_table(counts, encode, encoder="letters", assigned=["xxxy"])
    assert (table.datasets, table.num_clusters, table.seed) == (("first", "second"), 2, 0)
    assert np.allclose(table.centres_KW[0], encode(["aaaa"] * 3 + ["aaab"]).mean(axis=0), atol=1e-6)
    assert np.allclose(table.centres_KW[1], encode(["xxxx", "aaaa"]).mean(axis=0), atol=1e-6)
    # what two datasets share goes to the nearer mean, and what none has too
    assert [table.find(text) for text in ("aaaa", "aaab", "xxxx", "xxxy")] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="third: no instruction"):
        dataset_table({**counts, "third": {}}, encode, encoder="letters")


def test_an_index_says_what_is_in_a_cluster() -> None:
    table = fit_clusters(COUNTS, encode, encoder="letters", num_clusters=3, seed=0)
    index = cluster_index(table, COUNTS, shown=2)
    assert (index["num_clusters"], index["instructions"], index["distinct"]) == (3, 19, 6)
    assert [one["instructions"] for one in index["clusters"]] == [9, 6, 4]
    assert index["clusters"][1] == {
        "cluster": 1,
        "instructions": 6,
        "distinct": 3,
        "commonest": [{"instruction": "xxxx", "count": 3}, {"instruction": "xxxy", "count": 2}],
    }
    by_dataset = dataset_table({"d": {"aaaa": 1}}, encode, encoder="letters")
    assert cluster_index(by_dataset, {"aaaa": 1})["clusters"][0]["dataset"] == "d"


def test_a_record_of_several_templates_has_as_many_instructions() -> None:
    layout = PublishedLayout(GQA, image_pattern="{imageId}.jpg", instructions=("{QUESTION}", "Q: {QUESTION} A:"))
    rows = [{"question": "What?", "answer": "x"}, {"question": "What?", "answer": "y"}, {"question": "Why?"}]
    counts: Counter[str] = Counter()
    told: list[int] = []
    assert count_instructions(rows, counts, layout, told.append) == 1
    assert counts == {"What?": 2, "Q: What? A:": 2}
    assert sum(told) == 3


def test_embeddings_on_disk_give_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"".join(chr(97 + int(c)) for c in np.random.default_rng(i).integers(0, 26, 6)): 1 for i in range(60)}
    tables = []
    for limit in (clustering.IN_MEMORY, 0):
        monkeypatch.setattr(clustering, "IN_MEMORY", limit)
        tables.append(fit_clusters(texts, encode, encoder="letters", num_clusters=5, seed=1))
    assert np.array_equal(tables[0].centres_KW, tables[1].centres_KW)
    assert np.array_equal(tables[0].ids_I, tables[1].ids_I)
    assert isinstance(encode_all(sorted(texts), encode), np.memmap)
