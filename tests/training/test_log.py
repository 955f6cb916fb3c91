"""log.jsonl, TensorBoard's files, and lines for whoever watches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_lvlm.training.log import RunLog

VALUES: dict[str, Any] = {
    "stage": "tune",
    "step": 2,
    "global_step": 12,
    "loss": 1.5,
    "language_loss": 1.25,
    "balance_loss": None,
    "learning_rate": 0.01,
    "grad_norm": 2.0,
    "tokens_per_second": 1234.5,
    "expert_load": {"0": {"language": [1, 3], "vision": [4, 0]}},
    "conflicts": {"0": {"language": [1, 0], "vision": [0, 0]}},
    "tail_share": {"0": 0.25},
}


def test_events_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, is_enabled=True)
    log.event("stage", stage="tune", steps=3)
    log.event("step", **VALUES)
    log.show("tune", 2, 3, VALUES)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["stage", "step"]
    assert lines[1] == {"event": "step", **VALUES, "time": lines[1]["time"]}
    # experts: (1 + 4) and (3 + 0) of 8 assignments
    said = capsys.readouterr().err
    for part in ("tune 2/3", "loss 1.5000", "1,234 tokens/s", "experts 62/38 %", "lr 1.00e-02"):
        assert part in said

    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {
        "loss": 1.5,
        "language_loss": 1.25,
        "learning_rate": 0.01,
        "grad_norm": 2.0,
        "tokens_per_second": 1234.5,
        "expert_load/0/language/0": 0.25,
        "expert_load/0/language/1": 0.75,
        "expert_load/0/vision/0": 1.0,
        "expert_load/0/vision/1": 0.0,
        "conflict_share/0/language": 0.25,
        "conflict_share/0/vision": 0.0,
        "tail_share/0": 0.25,
    }
    assert set(curves.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (scalar,) = curves.Scalars(name)
        assert (scalar.step, scalar.value) == (12, pytest.approx(value))


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("0", "connector.0", "x"), "25/75"), (("connector.0", "x"), "40/40/20"), (("x",), "0/0/50/50")],
)
def test_experts_of_one_part_are_shown(
    names: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts have experts of their own, and not as many: the language model, a connector, adapters."""
    loads = {
        "0": {"language": [1, 3]},
        "connector.0": {"vision": [2, 2, 1]},
        "x": {"language": [0, 0, 1, 0], "vision": [0, 0, 0, 1]},
    }
    given = {"adapter.self_attn.q_proj.0" if name == "x" else name: loads[name] for name in names}
    log = RunLog(tmp_path, is_enabled=True)
    log.show("tune", 1, 2, VALUES | {"expert_load": given})
    log.close()
    assert f"experts {expected} %" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_json_all_the_same(tmp_path: Path) -> None:
    """A skipped step's: other languages' readers refuse NaN."""
    log = RunLog(tmp_path, is_enabled=True)
    log.event("step", **(VALUES | {"loss": math.nan, "grad_norm": math.inf}))
    log.close()
    json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for name in ("stage", "resume"):
        log = RunLog(tmp_path, is_enabled=True)
        log.event(name)
        log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["stage", "resume"]


def test_other_ranks_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, is_enabled=False)
    log.open_stage("tune", done=0, total=3)
    log.event("step", **VALUES)
    log.say("hello")
    log.advance()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    """It was being written when the machine failed or the disk was full; events that follow stay readable."""
    whole = '{"event": "stage", "time": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(whole + '{"event": "st')
    log = RunLog(tmp_path, is_enabled=True)
    log.event("resume", global_step=3)
    log.close()
    content = (tmp_path / "log.jsonl").read_text()
    assert content.startswith(whole)
    assert [json.loads(line)["event"] for line in content.splitlines()] == ["stage", "resume"]


def test_what_was_dropped_is_said_by_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, is_enabled=True)
    values = VALUES | {"dropped": {"0": {"language": [1, 0], "vision": [0, 0]}}}
    log.event("step", **values)
    log.show("tune", 2, 3, values)
    log.close()
    # one of five language assignments found no room, none of four vision ones
    assert "language dropped 20.0%  vision dropped 0.0%" in capsys.readouterr().err
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert curves.Scalars("dropped_share/language")[0].value == pytest.approx(0.2)
    assert curves.Scalars("dropped_share/vision")[0].value == 0
