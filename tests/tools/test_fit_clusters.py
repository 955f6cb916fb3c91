"""tools/fit_clusters.py: what it counts, prints and writes, its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_lvlm.data import encoder
from moe_lvlm.data.clusters import ClusterTable
from tests.data.letters import encode
from tests.tiny_run import write_run_inputs
from tests.tools.conftest import Import


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("fit_clusters")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An encoder of letters in the place of one that is loaded; with what it was loaded."""
    calls: list[Any] = []

    def load(name: str, *, device: str | None, batch_size: int) -> encoder.Encode:
        calls.append((name, device, batch_size))
        return encode

    monkeypatch.setattr(encoder, "load_encoder", load)
    return calls


def write_records(path: Path, *questions: str) -> str:
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in questions]
    path.write_text(json.dumps([{"conversations": one} for one in turns]))
    return str(path)


def test_a_table_of_two_files(
    tool: ModuleType, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_records(tmp_path / "one.json", "aaaa", "aaab", "aaaa", "xxxx")
    two = write_records(tmp_path / "two.json", "xxxy", "")
    out = tmp_path / "made" / "clusters.safetensors"
    arguments = [
        one,
        two,
        one,
        "--clusters",
        "3",
        "--encoder",
        "folder",
        "--encoder-name",
        "letters",
        "--out",
        str(out),
    ]
    evaluated = write_records(tmp_path / "eval.json", "aabb")
    assert tool.main([*arguments, "--assign", evaluated, "--batch-size", "7", "--device", "cpu", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert asked == [("folder", "cpu", 7)]
    table = ClusterTable.load(out)
    assert [table.find(text) for text in ("aaaa", "aaab", "aabb", "xxxx", "xxxy", "")] == [0, 0, 0, 1, 1, 2]
    assert (table.encoder, table.seed) == ("letters", 5)
    # each file is read once, whoever names it twice
    assert printed.count(f"{one}: 4 records") == 1
    assert "5 distinct instructions\n" in printed
    assert "cluster 0: 3 instructions, 2 distinct\n        2 x aaaa\n        1 x aaab\n" in printed
    index = out.with_suffix(".json")
    assert printed.endswith(f"wrote {out}: 3 clusters, 6 instructions; {index}\n")
    found = json.loads(index.read_text())
    assert [one["instructions"] for one in found["clusters"]] == [3, 2, 1]
    assert found["clusters"][0]["commonest"][0] == {"instruction": "aaaa", "count": 2}
    # the same input and seed give the same files
    before = out.read_bytes(), index.read_bytes()
    assert tool.main([*arguments, "--assign", evaluated, "--seed", "5"]) == 0
    assert (out.read_bytes(), index.read_bytes()) == before


def test_the_records_of_a_recipe(
    tool: ModuleType, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_run_inputs(tmp_path)
    out = tmp_path / "clusters.safetensors"
    assert tool.main([str(recipe), "stages.1.name=more", "--clusters", "2", "--stage", "more", "--out", str(out)]) == 0
    table = ClusterTable.load(out)
    assert {table.find("what color is it ?"), table.find("say hello")} == {0, 1}
    assert table.encoder == "sentence-transformers/all-MiniLM-L6-v2"
    assert "cluster 0: 32 instructions, 1 distinct" in capsys.readouterr().out


RECIPE = """
name: asked
model: {{from_pretrained: x, adapter: {{kind: mocle, num_clusters: 3, gating: cluster}}}}
data:
  image_root: {root}
  mixture:
    - {{name: asked, source: gqa, path: q.json, image_root: none, instructions: ["{{QUESTION}}", "xxx {{QUESTION}}"]}}
    - {{name: wanted, source: gqa, path: q.json, image_root: none, instructions: ["zzzz {{ANSWER}}"], weight: 2}}
    - {{name: said, path: r.json}}
stages:
  - {{name: one, train: [connector], steps: 1, learning_rate: 1, mixture: [{{path: none.json}}]}}
  - {{name: two, adapt: true, train: [adapter], steps: 1, learning_rate: 1}}
"""


@pytest.fixture
def asked_recipe(tmp_path: Path) -> str:
    questions = {str(number): {"imageId": "1", "question": "aaa", "answer": "b"} for number in range(3)}
    (tmp_path / "q.json").write_text(json.dumps(questions))
    write_records(tmp_path / "r.json", "aaa", "aab")
    (tmp_path / "asked.yaml").write_text(RECIPE.format(root=tmp_path))
    return str(tmp_path / "asked.yaml")


def test_any_source_and_template(
    tool: ModuleType, asked: list[Any], asked_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images need not be there, nor what stages before the adapting one read; the recipe says how many clusters."""
    out = tmp_path / "clusters.safetensors"
    assert tool.main([asked_recipe, "--out", str(out)]) == 0
    table = ClusterTable.load(out)
    assert [table.find(text) for text in ("aaa", "aab", "xxx aaa", "zzzz b")] == [0, 0, 1, 2]
    assert "cluster 0: 5 instructions, 2 distinct\n        4 x aaa\n" in capsys.readouterr().out


def test_a_cluster_a_dataset(
    tool: ModuleType, asked: list[Any], asked_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "datasets.safetensors"
    assert tool.main([asked_recipe, "--by-dataset", "--out", str(out)]) == 0
    table = ClusterTable.load(out)
    assert table.datasets == ("asked", "wanted", "said")
    assert [table.find(text) for text in ("aab", "xxx aaa", "zzzz b")] == [2, 0, 1]
    assert "cluster 1 (wanted): 3 instructions, 1 distinct" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main([asked_recipe, "--by-dataset", "--clusters", "3", "--out", str(out)])


def test_a_dry_run_needs_no_encoder(
    tool: ModuleType, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clusters.safetensors"
    records = write_records(tmp_path / "one.json", "aaaa", "aaaa", "b  b")
    assert tool.main([records, "--clusters", "2", "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "      2 x aaaa\n        1 x b b\n" in printed
    assert f"would write {out}: 2 clusters, 2 instructions" in printed
    assert not out.exists()
    assert asked == []


def test_mistakes(tool: ModuleType, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "clusters.safetensors")]
    records = write_records(tmp_path / "one.json", "aaaa", "b")
    assert tool.main([records, *out]) == 2
    assert "error: --clusters: 128 of 2 distinct instructions; allowed: 1 to 2" in capsys.readouterr().err
    assert asked == []
    assert tool.main(["quickstar", *out]) == 2
    assert "quickstar: neither records nor a recipe" in capsys.readouterr().err
    assert tool.main(["scale=tiny", *out]) == 2
    assert "no records: name a recipe" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "none.json"), *out]) == 2
    assert "none.json: does not exist" in capsys.readouterr().err
    for arguments, said in (
        (["--out", "table.bin"], "allowed: a file that ends in .safetensors"),
        ([*out, "--clusters", "0"], "--clusters: 0; allowed: 1 or more"),
        ([*out, "--seed", "-1"], "--seed: -1; allowed: 0 or more"),
    ):
        with pytest.raises(SystemExit):
            tool.main([records, *arguments])
        assert said in capsys.readouterr().err
