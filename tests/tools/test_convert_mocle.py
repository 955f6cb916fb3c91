"""`convert.py mocle`: a checkpoint of MoCLE's authors as a model folder, and their k-means as a table of clusters."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.cluster import KMeans

import moe_lvlm
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.conversion import released_mocle
from moe_lvlm.data.clusters import ClusterTable
from tests.conversion.test_released_mocle import CLUSTERS, WIDTH, their_model, write_theirs
from tests.tiny_run import write_instructblip
from tests.tools.conftest import Import


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("convert")


def test_mocle(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_encoder(name: str, **options: Any) -> Any:
        assert name == "sentence-transformers/all-MiniLM-L6-v2"
        return lambda texts: np.ones((len(texts), WIDTH), np.float32)

    monkeypatch.setattr(released_mocle, "load_encoder", load_encoder)
    monkeypatch.delenv("MOE_LVLM_ENCODER", raising=False)
    write_instructblip(tmp_path / "base")
    _, state = their_model(tmp_path / "base")
    file = write_theirs(tmp_path / "c.pth", state, gates_tmp=None)
    points = np.random.default_rng(0).normal(size=(40, WIDTH)).astype(np.float32)
    joblib.dump(KMeans(CLUSTERS, n_init=1, random_state=0).fit(points), tmp_path / "k.pkl")
    out, table = tmp_path / "out", tmp_path / "table.safetensors"
    arguments = ["mocle", str(file), "--base", str(tmp_path / "base"), "-o", str(out), "--kmeans"]
    arguments += [str(tmp_path / "k.pkl"), str(table)]
    assert tool.main(arguments) == 2
    assert "does not say the temperature of the gates (gates_tmp); allowed: --temperature" in capsys.readouterr().err
    assert tool.main([*arguments, "--temperature", "0.05", "--dry-run"]) == 0
    assert not out.exists() and not table.exists()
    assert tool.main([*arguments, "--temperature", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert "note: alpha 32 and dropout 0.1 are those of the authors' code" in printed
    assert f"the table of clusters is in {table}" in printed
    model, _ = moe_lvlm.load(out)
    settings = model.config.adapter_settings
    assert isinstance(settings, MoCLESettings) and settings.temperature == 0.05
    assert ClusterTable.load(table).num_clusters == CLUSTERS
