"""What a run's folder must hold after the run was stopped."""

from __future__ import annotations

from pathlib import Path

from torch.testing import assert_close

from tests.training.launching import events


def assert_stopped(run: Path, unbroken: Path) -> None:
    """It said so, in the second stage, and saved after the last step; its losses are those of an unbroken run."""
    assert not (run / "DONE").exists()
    log = events(run)
    assert log.lines[-1]["event"] == "stopped"
    step = log.named("step")[-1]
    assert step["stage"] == "sparse" and step["step"] < 300
    assert (run / "checkpoints" / "latest").read_text().strip() == f"sparse-{step['step']:06d}"
    losses = log.losses()
    assert len(losses) == 2 + step["step"]
    # Later ones drift apart: another number of processes takes its sums in another order.
    assert_close(losses[:20], events(unbroken).losses()[: len(losses)][:20], rtol=1e-4, atol=1e-4)
