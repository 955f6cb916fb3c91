"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lvlm.checkpoint.verify import verify
from tests.training.launching import Server, events

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_last_the_multiples_and_the_ends_stay(
    background: str, server: Server, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keeps = ["train.checkpoint.every=1", "train.checkpoint.keep_last=1", "train.checkpoint.keep_every=2"]
    server.run(["train", str(recipe), *keeps, f"train.checkpoint.background={background}", f"output_dir={run}"])
    # By hand: stages of 3 and 5 steps; multiples of 2, the ends, and of the rest only the very last, which is an end.
    kept = ["tune-000002", "tune-000003", "sparse-000002", "sparse-000004", "sparse-000005"]
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert found == sorted([*kept, "latest"])
    assert all(verify(run / "checkpoints" / name) == [] for name in kept)
    saved = [Path(line["path"]).name for line in events(run).named("checkpoint")]
    assert saved == [*(f"tune-{step:06d}" for step in (1, 2, 3)), *(f"sparse-{step:06d}" for step in range(1, 6))]
