"""Records that cannot be used: skipped, counted and listed, whichever process met them; too many end the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import tiny_recipe, write_run_inputs
from tests.training.launching import Server, events

pytestmark = pytest.mark.distributed

STEPS = 10  # of 8 samples: each of the 40 records is drawn twice
BAD = (1, 8, 13, 16, 22, 29)  # records with images


def spoil(folder: Path) -> None:
    """Two images that are none, two that are missing, two records with a mark too many."""
    records = json.loads((folder / "train.json").read_text())
    for index in BAD[:2]:
        image = folder / records[index]["image"]
        image.write_bytes(image.read_bytes()[:60])
    for index in BAD[2:4]:
        (folder / records[index]["image"]).unlink()
    for index in BAD[4:]:
        records[index]["conversations"][0]["value"] += " <image>"
    (folder / "train.json").write_text(json.dumps(records))


def test_bad_records_are_skipped_up_to_the_limit(server: Server, tmp_path: Path) -> None:
    stage = tiny_recipe(tmp_path)["stages"][0] | {"steps": STEPS}
    recipe = write_run_inputs(tmp_path, stages=[stage])
    spoil(tmp_path)
    run = tmp_path / "run"

    # 2 bad draws are allowed in an epoch of 40
    job = server.start(["train", str(recipe), "data.bad_sample_limit=0.05"])
    assert job.wait() == [2, 2], job.output
    assert job.output.count("error:") == 1
    assert not (run / "DONE").exists()
    listed = read_list(run)
    assert {line["record"] for line in listed} < set(BAD)
    error = job.output[job.output.index("error:") :]
    for fact in ("bad_sample_limit 0.05", f"{tmp_path}/train.json", f"record {listed[0]['record']}"):
        assert fact in error
    found = re.match(r"error: (\d+) of (\d+) samples are bad", error)
    assert found is not None
    bad, seen = map(int, found.groups())
    assert 2 < bad <= len(BAD)
    assert seen % 8 == 0

    # with a higher limit the same run goes on
    server.run(["train", str(recipe), "data.bad_sample_limit=0.2"])
    assert (run / "DONE").exists()
    listed = read_list(run)
    assert sorted(line["record"] for line in listed) == sorted(BAD)
    assert {line["file"] for line in listed} == {f"{tmp_path}/train.json"}
    reasons = {line["record"]: line["reason"] for line in listed}
    for index in BAD[:4]:
        assert f"images/{index}.png" in reasons[index]
    for index in BAD[4:]:
        assert "2 <image> mark(s)" in reasons[index]
    state = json.loads((run / "checkpoints" / f"tune-{STEPS:06d}" / "state.json").read_text())
    assert state["samples"] == 80
    assert state["bad"] == 2 * len(BAD)
    assert len(events(run).steps()) == STEPS


def read_list(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
