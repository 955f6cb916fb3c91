"""The torture tool: a short run of all faults that training survives, and a judge that does complain."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 6
FAULTS = {
    "SIGTERM or SIGINT of all ranks", "a write that fails (EFBIG)", "a truncated file", "a flipped bit",
    "half a line in log.jsonl", "a vanished shard", "a vanished manifest", "a vanished `latest`",
    "a second run in the folder",
}  # fmt: skip
TMPFS_FAULTS = {"little room on the disk (tmpfs)", "a full disk (tmpfs)"}
LAST = "sparse-000005"


@dataclass(frozen=True)
class Tool:
    """The script and its judge, and what a short run of it left."""

    script: ModuleType
    judge: ModuleType
    folder: Path
    status: int
    result: dict[str, Any]

    def problems(self, run: Path, **options: Any) -> list[tuple[str, str]]:
        """What the judge says of a run, as kinds and texts; options: of what its last start found."""
        judge = self.judge.Judge(self.folder / "unbroken", self.folder / "inputs" / "recipe.yaml")
        before = self.judge.Before(**options)
        return [(problem.kind, problem.text) for problem in judge.judge(run, before)]


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tool]:
    folder = tmp_path_factory.mktemp("torture")
    sys.path.insert(0, str(ROOT / "tools"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        import torture
        import torturing.judge

        options = [
            "--kills",
            str(KILLS),
            "--dir",
            str(folder / "runs"),
            "--json",
            str(folder / "result.json"),
            "--keep",
        ]
        status = torture.main(options)
        result = json.loads((folder / "result.json").read_text())
        yield Tool(torture, torturing.judge, folder / "runs", status, result)
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.distributed
def test_training_survives(tool: Tool) -> None:
    faults = tool.result["faults"]
    assert tool.status == 0, tool.result
    assert tool.result["is_good"]
    assert sum(row["times"] for name, row in faults.items() if name.startswith(("SIGKILL", "killed"))) == KILLS
    expected = FAULTS if tool.result["notes"] else FAULTS | TMPFS_FAULTS
    assert {name for name, row in faults.items() if row["times"]} >= expected - {"SIGTERM or SIGINT of all ranks"}
    assert all(row[kind] == 0 for row in faults.values() for kind in ("lost", "wrong", "different"))
    assert not [process for process in commands() if str(tool.folder) in process]


def commands() -> list[str]:
    """Command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def edit_log(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    change(events)
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def remove_events(run: Path, name: str, is_removed: Callable[[dict[str, Any]], bool]) -> None:
    def change(events: list[dict[str, Any]]) -> None:
        events[:] = [event for event in events if event["event"] != name or not is_removed(event)]

    edit_log(run, change)


def remove_newest(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / LAST)


def remove_end_of_stage(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "tune-000003")


def remove_kept_for_good(run: Path) -> None:
    """Not one of the last two, but a multiple of keep_every."""
    shutil.rmtree(run / "checkpoints" / "sparse-000003")


def remove_last_but_one(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "sparse-000004")


def flip_bit(run: Path) -> None:
    path = run / "checkpoints" / LAST / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_weights(run: Path) -> None:
    """A whole checkpoint of another step under the last one's name."""
    remove_newest(run)
    shutil.copytree(run / "checkpoints" / "sparse-000004", run / "checkpoints" / LAST)


def change_loss(run: Path) -> None:
    """By less than any tolerance."""

    def change(events: list[dict[str, Any]]) -> None:
        named(events, "step")[4]["loss"] *= 1 + 1e-15

    edit_log(run, change)


def remove_step(run: Path) -> None:
    remove_events(run, "step", lambda event: event["global_step"] == 6)


def break_line(run: Path) -> None:
    path = run / "log.jsonl"
    path.write_text(path.read_text().replace('{"event": "step"', '{"event": "st{"event": "step"', 1))


def leave_rubbish(run: Path) -> None:
    (run / "checkpoints" / ".sparse-000005.tmp").mkdir()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (remove_newest, "lost", LAST),
        (remove_end_of_stage, "lost", "tune-000003"),
        (remove_kept_for_good, "lost", "sparse-000003"),
        (remove_last_but_one, "lost", "sparse-000004"),
        (flip_bit, "lost", "rank-00000.safetensors: xxh3-128 is"),
        (swap_weights, "different", "in the unbroken run {'size'"),
        (change_loss, "different", "loss is"),
        (remove_step, "different", "has no step"),
        (break_line, "different", "line"),
        (leave_rubbish, "wrong", "left half done"),
    ],
)
def test_the_judge_complains(change: Callable[[Path], None], kind: str, text: str, tool: Tool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tool.folder / "damaged-0", run)
    assert tool.problems(run, num_events=1000) == []
    change(run)
    found = tool.problems(run, num_events=1000)
    assert any(one == kind and text in said for one, said in found), found


@pytest.mark.distributed
def test_the_judge_knows_where_a_run_must_go_on(tool: Tool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tool.folder / "unbroken", run)
    (run / "DONE").unlink()
    for name in ("sparse-000004", LAST):
        shutil.rmtree(run / "checkpoints" / name)
    (run / "checkpoints" / "latest").write_text("sparse-000003\n")
    places = tool.judge.before_start(run).places
    assert places == {"sparse-000003"}

    start = len((run / "log.jsonl").read_text().splitlines())
    resume = {"event": "resume", "path": str(run / "checkpoints" / "sparse-000002"), "global_step": 5, "time": 0.0}
    edit_log(run, lambda events: events.append(resume))
    kinds = [kind for kind, text in tool.problems(run, num_events=start, places=places) if "went on from" in text]
    assert kinds == ["wrong"]
    edit_log(run, lambda events: events[-1].update(event="stage"))
    kinds = [kind for kind, text in tool.problems(run, num_events=start, places=places) if "began anew" in text]
    assert kinds == ["wrong"]

    # damaged: the one before it; not said to be saved yet: either
    (run / "checkpoints" / "sparse-000003" / "state.json").write_text("{}")
    assert tool.judge.before_start(run).places == {"sparse-000002"}
    (run / "checkpoints" / "latest").write_text("sparse-000001\n")
    assert tool.judge.before_start(run).places == {"sparse-000002"}
    remove_events(run, "checkpoint", lambda event: event["path"].endswith("sparse-000002"))
    assert tool.judge.before_start(run).places == {"sparse-000001", "sparse-000002"}


@pytest.mark.distributed
def test_mistakes(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        (["--faults", "kill,fire"], "fire; allowed: all, or some of kill"),
        (["--kills", "0"], "above 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool.script.parse_args(options)
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert tool.script.main(["--dir", str(tmp_path)]) == 2
    assert f"--dir: {tmp_path} is there and not an empty folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_nothing_outlives_a_killed_tool(tmp_path: Path) -> None:
    """Not even when it has no time to clean up."""
    options = ["--kills", "1000", "--faults", "kill", "--dir", str(tmp_path / "runs")]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "torture.py"), *options], stderr=output)
    limit = time.monotonic() + 300
    while "3/1000" not in (tmp_path / "output.txt").read_text():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    ours = [pid for pid in process_ids() if is_below(pid, process.pid)]
    assert len(ours) >= 2
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ours):
        assert time.monotonic() < limit
        time.sleep(0.1)


def process_ids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == ancestor:
            return True
    return False
