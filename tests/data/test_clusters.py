"""Tables of clusters: hashes, files, the cluster of known and unknown instructions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from moe_lvlm.data.clusters import FACTS, PROBE, ClusterTable, InstructionClusters, nearest_centres
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.instructions import first_instruction, human_texts, instruction_hash
from moe_lvlm.data.records import Turn

from .letters import encode

# Clusters of the letters a and b; "cc" is nearer to neither, so the lower one takes it.
CENTRES = np.stack([encode(["a"])[0], encode(["b"])[0]])
KNOWN = {"aaa": 0, "bbb": 1, "ab": 1}


@pytest.fixture
def table() -> ClusterTable:
    hashes = np.array([instruction_hash(text) for text in KNOWN], dtype=np.uint64)
    order = np.argsort(hashes)
    return ClusterTable(
        centres_KW=CENTRES,
        hashes_I=hashes[order],
        ids_I=np.array(list(KNOWN.values()), dtype=np.int32)[order],
        probe_W=encode([PROBE])[0],
        encoder="letters",
        seed=3,
    )


def test_the_hash_is_that_of_the_reference() -> None:
    # XXH3_64bits of nothing, as the specification of xxHash gives it
    assert instruction_hash("") == 0x2D06800538D394C2
    assert instruction_hash("é") == instruction_hash("\u00e9") != instruction_hash("e\u0301")


def test_an_instruction_is_the_first_human_turn_without_images() -> None:
    turns = (Turn("human", "<image>\n What is it?\n<image>"), Turn("gpt", "A cat."), Turn("human", "Why?"))
    assert first_instruction(turns) == "What is it?"
    assert human_texts(turns) == ("What is it?", "Why?")
    assert first_instruction((Turn("human", "<image>"),)) == ""


def test_a_table_comes_back_from_its_file(table: ClusterTable, tmp_path: Path) -> None:
    table.save(tmp_path / "deep" / "clusters.safetensors")
    read = ClusterTable.load(tmp_path / "deep" / "clusters.safetensors")
    for name in ("centres_KW", "hashes_I", "ids_I", "probe_W"):
        expected, found = getattr(table, name), getattr(read, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert (read.encoder, read.seed, read.num_clusters, read.width) == ("letters", 3, 2, 26)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["clusters.safetensors"]


def test_the_same_table_makes_the_same_file(table: ClusterTable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        table.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_known_instructions_need_no_encoder(table: ClusterTable) -> None:
    def refuse(texts: object) -> NDArray[np.float32]:
        raise AssertionError("the encoder was asked")

    clusters = InstructionClusters(table, encode=refuse)
    # "ab" is as near to both; the table, not the distance, says 1
    assert {text: clusters.cluster(text) for text in KNOWN} == KNOWN
    assert table.find("abc") is None


def test_unknown_ones_go_to_the_nearest_centre_and_are_encoded_once(table: ClusterTable) -> None:
    asked: list[str] = []

    def listen(texts: Any) -> NDArray[np.float32]:
        asked.extend(texts)
        return encode(texts)

    clusters = InstructionClusters(table, encode=listen)
    assert [clusters.cluster(text) for text in ("bba", "baa", "bba", "cc")] == [1, 0, 1, 0]
    assert asked == [PROBE, "bba", "baa", "cc"]


def test_nearest_is_the_shortest_distance() -> None:
    generator = np.random.default_rng(0)
    # of several lengths: the centre with the highest product is not always the nearest
    centres = (generator.normal(size=(7, 5)) * generator.uniform(0.2, 3, (7, 1))).astype(np.float32)
    points = generator.normal(size=(9000, 5)).astype(np.float32)
    by_hand = [min(range(7), key=lambda k: float(((point - centres[k]) ** 2).sum())) for point in points]
    assert nearest_centres(centres, points).tolist() == by_hand
    assert nearest_centres(centres, points[:0]).shape == (0,)


def test_another_encoder_is_refused(table: ClusterTable) -> None:
    with pytest.raises(
        ValueError, match=r"does not hold the instruction 'cc'.*its embeddings are 5 wide, the table's 26"
    ):
        InstructionClusters(table, encode=lambda texts: encode(texts)[:, :5]).cluster("cc")
    with pytest.raises(ValueError, match=r"not the one that made the table .*cosine of 0\.\d+\); allowed: letters"):
        InstructionClusters(table, encode=lambda texts: encode(texts)[:, ::-1]).cluster("cc")


def test_a_missing_encoder_is_an_error_that_says_what_to_do(
    table: ClusterTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"encoder 'letters': .*pip install sentence-transformers`"):
        InstructionClusters(table).cluster("cc")
    monkeypatch.setenv("MOE_LVLM_ENCODER", "elsewhere/model")
    with pytest.raises(ValueError, match="encoder 'elsewhere/model'"):
        InstructionClusters(table).cluster("cc")
    with pytest.raises(ValueError, match="encoder 'named'"):
        InstructionClusters(table, encoder="named").cluster("cc")


def damage(tensors: dict[str, NDArray[Any]], facts: dict[str, Any], what: str) -> None:
    """One mistake in a file's contents."""
    match what:
        case "tensor":
            del tensors["ids"]
        case "dtype":
            tensors["hashes"] = tensors["hashes"].astype(np.int64)
        case "shape":
            tensors["centres"] = tensors["centres"][0]
        case "probe":
            tensors["probe"] = tensors["probe"][:3]
        case "number":
            tensors["centres"][0, 0] = np.nan
        case "order":
            tensors["hashes"] = tensors["hashes"][::-1].copy()
        case "length":
            tensors["ids"] = tensors["ids"][:2]
        case "id":
            tensors["ids"][0] = 2
        case "encoder":
            facts["encoder"] = ""
        case "count":
            facts["num_clusters"] = 3
        case "seed":
            facts["seed"] = "three"
        case "version":
            facts["format_version"] = 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tensor", r"holds the tensors \['centres', 'hashes', 'probe'\]"),
        ("dtype", r"hashes is int64 \(3,\); allowed: uint64"),
        ("shape", r"centres is float32 \(26,\)"),
        ("probe", r"centres are \(2, 26\) and the probe \(3,\)"),
        ("number", "not a number"),
        ("order", "hashes that do not ascend"),
        ("length", "3 hashes for 2 ids"),
        ("id", r"ids from \d to 2; allowed: 0 to 1"),
        ("encoder", "encoder is ''"),
        ("count", "num_clusters is 3, but there are 2 centres"),
        ("seed", "seed is 'three'"),
        ("version", "format_version 2; this version of moe_lvlm reads 1"),
    ],
)
def test_a_file_with_a_mistake_is_refused(table: ClusterTable, tmp_path: Path, what: str, said: str) -> None:
    path = tmp_path / "clusters.safetensors"
    table.save(path)
    tensors = load_file(path)
    facts = {"format_version": 1, "encoder": "letters", "num_clusters": 2, "seed": 3}
    damage(tensors, facts, what)
    save_file(tensors, path, metadata={FACTS: json.dumps(facts)})
    with pytest.raises(DataFileError, match=rf"clusters\.safetensors: .*{said}"):
        ClusterTable.load(path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clusters.safetensors"
    with pytest.raises(DataFileError, match=r"no such file; allowed: .*fit_clusters\.py"):
        ClusterTable.load(path)
    path.write_bytes(b"{}")
    with pytest.raises(DataFileError, match="not a safetensors file"):
        ClusterTable.load(path)
    save_file({"x": CENTRES}, path)
    with pytest.raises(DataFileError, match="no table of clusters"):
        ClusterTable.load(path)
