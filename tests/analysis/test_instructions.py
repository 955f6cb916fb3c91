"""The sample of instructions: its clusters, its file, and its map with an encoder that is a dictionary."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_lvlm.analysis.instructions import Instruction, InstructionSample, map_instructions, run_encoder
from moe_lvlm.data.clusters import ClusterTable

# Two groups far apart: what is asked, and what is to be described. One text is in both datasets.
PLACES = {
    "how many ?": (1.0, 0.0), "how many cats ?": (0.99, 0.1), "where ?": (0.98, 0.15),
    "describe": (0.0, 1.0), "a photo of": (0.1, 0.99), "tell": (0.2, 0.9),
}  # fmt: skip


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    return np.array([PLACES[text] for text in texts], dtype=np.float32)


def sample() -> InstructionSample:
    vqa = ["how many ?", "how many cats ?", "how many ?", "where ?", "tell"]
    cap = ["describe", "a photo of", "tell", "describe"]
    return InstructionSample(
        num_clusters=3,
        datasets={
            "vqa": [Instruction(text, 2 if text == "tell" else 0) for text in vqa],
            "cap": [Instruction(text, 2) for text in cap],
        },
        left_out={"gone": "no such file"},
    )


def test_clusters_are_counted_by_dataset() -> None:
    assert sample().clusters_by_dataset().tolist() == [[4, 0, 1], [0, 0, 4]]
    assert sample().has_clusters
    unknown = InstructionSample(datasets={"a": [Instruction("x", None)]})
    assert not unknown.has_clusters
    with pytest.raises(ValueError, match="no clusters; allowed: a sample of a run"):
        unknown.clusters_by_dataset()


def test_map_has_a_point_for_each_instruction_and_is_always_the_same(tmp_path: Path) -> None:
    found = map_instructions(sample(), encode)
    assert found.dataset == ("vqa",) * 5 + ("cap",) * 4
    assert found.positions.shape == (9, 2)
    assert np.isfinite(found.positions).all()
    # a text has one place, also where two datasets have it, and others have others
    places = {(one.text, *position) for one, position in zip(found.instruction, found.positions.tolist(), strict=True)}
    assert len(places) == len(PLACES) == len({place[1:] for place in places})
    assert (map_instructions(sample(), encode).positions == found.positions).all()
    few = map_instructions(sample(), encode, per_dataset=3)
    assert [one.text for one in few.instruction] == [
        "how many ?", "how many cats ?", "how many ?", "describe", "a photo of", "tell",
    ]  # fmt: skip
    found.save(tmp_path / "points.json")
    points = json.loads((tmp_path / "points.json").read_text())
    assert points[3] == {
        "dataset": "vqa", "cluster": 0, "instruction": "where ?",
        "x": found.positions[3, 0], "y": found.positions[3, 1],
    }  # fmt: skip


def test_neighbours_of_the_same_dataset_are_counted_beside_chance() -> None:
    found = map_instructions(sample(), encode)
    pairs = {(name, one.text) for name, of in sample().datasets.items() for one in of}
    measured, chance = [], []
    for name, text in pairs:
        others = [other for other in pairs if other[1] != text]
        cosines = [
            float(np.dot(PLACES[text], PLACES[other]) / np.linalg.norm(PLACES[text]) / np.linalg.norm(PLACES[other]))
            for _, other in others
        ]
        nearest = [owner for (owner, _), cosine in zip(others, cosines, strict=True) if cosine > max(cosines) - 1e-6]
        measured.append(nearest.count(name) / len(nearest))
        chance.append(sum(owner == name for owner, _ in others) / len(others))
    assert found.same_dataset == pytest.approx(np.mean(measured))
    assert found.by_chance == pytest.approx(np.mean(chance))
    assert np.mean(measured) > np.mean(chance) + 0.2  # else the test could not tell them apart


def test_too_few_instructions_are_not_mapped() -> None:
    same = InstructionSample(1, {"a": [Instruction(text, 0) for text in ("tell", "describe", "where ?")] * 5})
    with pytest.raises(ValueError, match="3 distinct instructions; allowed: 4 or more"):
        map_instructions(same, encode)


def test_without_scikit_learn_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ValueError, match="t-SNE: scikit-learn cannot be imported"):
        map_instructions(sample(), encode)


def test_round_trip(tmp_path: Path) -> None:
    for one in (sample(), InstructionSample(), InstructionSample(datasets={"a": [Instruction("x", None)]})):
        one.save(tmp_path / "instructions.json")
        assert InstructionSample.load(tmp_path / "instructions.json") == one


GOOD = {"format": 1, "num_clusters": 2, "datasets": {"a": [["x", 1]]}, "left_out": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "a sample of instructions of format 2; allowed: 1"),
        ({"num_clusters": 0}, "num_clusters: .0.; allowed: whole numbers from 1"),
        ({"datasets": []}, r"datasets: \[\]; allowed: an object"),
        ({"datasets": {"a": [["x", 2]]}}, r"dataset 'a': \['x', 2\]; allowed: a text and a cluster below 2"),
        ({"datasets": {"a": [["x", None]]}}, "allowed: a text and a cluster below 2"),
        ({"datasets": {"a": [[3, 1]]}}, "allowed: a text and a cluster"),
        ({"datasets": {"a": ["xy"]}}, "allowed: a text and a cluster"),
        ({"num_clusters": None}, "allowed: a text and null"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(GOOD))
    assert InstructionSample.load(path).datasets == {"a": [Instruction("x", 1)]}
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=message) as error:
        InstructionSample.load(path)
    assert str(path) in str(error.value)


def test_encoder_is_the_table_s_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ClusterTable(
        centres_KW=np.eye(2, dtype=np.float32),
        hashes_I=np.array([3], dtype=np.uint64),
        ids_I=np.array([1], dtype=np.int32),
        probe_W=np.array([1.0, 0.0], dtype=np.float32),
        encoder="our/encoder",
        seed=0,
    )
    table.save(tmp_path / "table.safetensors")
    recipe = {"data": {"clusters": "table.safetensors", "image_root": str(tmp_path)}}
    asked: list[str] = []

    def loading(probe: tuple[float, float]) -> Any:
        def load(name: str, *, device: str | None = None) -> Any:
            asked.append(name)
            return lambda texts: np.array([probe] * len(texts), dtype=np.float32)

        return load

    monkeypatch.delenv("MOE_LVLM_ENCODER", raising=False)
    monkeypatch.setattr("moe_lvlm.analysis.instructions.load_encoder", loading((2.0, 0.0)))
    assert run_encoder(recipe)(["a"]).tolist() == [[2.0, 0.0]]
    run_encoder({})
    monkeypatch.setenv("MOE_LVLM_ENCODER", "elsewhere")
    run_encoder(recipe)
    assert asked == ["our/encoder", "sentence-transformers/all-MiniLM-L6-v2", "elsewhere"]
    monkeypatch.setattr("moe_lvlm.analysis.instructions.load_encoder", loading((0.0, 1.0)))
    with pytest.raises(ValueError, match="encoder 'elsewhere': it is not the one that made the table"):
        run_encoder(recipe)
    (tmp_path / "table.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file; allowed: a table of clusters"):
        run_encoder(recipe)
