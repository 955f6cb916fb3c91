"""`moe-lvlm logs`: the right lines of the right ranks, of large and growing files."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lvlm.monitoring import tail
from moe_lvlm.monitoring.follow import follow
from moe_lvlm.monitoring.printing import print_errors, print_job, print_ranks
from moe_lvlm.monitoring.rank_logs import ranges
from tests.monitoring.run_files import RunFiles, header


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    """Two attempts of three ranks; rank 2 is not part of the second."""
    run = RunFiles(tmp_path / "run")
    for rank in range(3):
        run.rank_log(rank, header(1, rank, "n1") + f"first of {rank}\nsecond of {rank}\n")
    for rank in range(2):
        run.rank_log(rank, header(2, rank, "n2") + f"third of {rank}\nfourth of {rank}\n")
    return run


def ranks(run: RunFiles, *, rank: int | None = 0, attempt: int | None = None, lines: int = 40) -> list[str]:
    printed = io.StringIO()
    print_ranks(run.folder, rank=rank, attempt=attempt, lines=lines, is_followed=False, file=printed)
    return printed.getvalue().splitlines()


def errors(run: RunFiles, attempt: int | None = None) -> list[str]:
    printed = io.StringIO()
    print_errors(run.folder, attempt=attempt, file=printed)
    return printed.getvalue().splitlines()


def test_the_newest_attempt_of_rank_0(run: RunFiles) -> None:
    assert ranks(run) == [header(2, 0, "n2").strip(), "third of 0", "fourth of 0"]
    assert ranks(run, lines=1) == ["fourth of 0"]


def test_an_attempt_of_a_rank(run: RunFiles) -> None:
    assert ranks(run, rank=1, attempt=1, lines=2) == ["first of 1", "second of 1"]
    assert ranks(run, rank=2, lines=1) == ["second of 2"]  # the newest that it has


def test_all_ranks_of_one_attempt(run: RunFiles) -> None:
    assert ranks(run, rank=None, lines=1) == ["rank 0| fourth of 0", "rank 1| fourth of 1"]
    run.rank_log(10, header(1, 10, "n5") + "only\n")
    assert ranks(run, rank=None, attempt=1, lines=1) == [
        "rank  0| second of 0",
        "rank  1| second of 1",
        "rank  2| second of 2",
        "rank 10| only",
    ]


def test_half_a_line_a_progress_bar_and_broken_text(run: RunFiles) -> None:
    path = run.rank_log(0, "10%\r20%\r30%\nha")
    with path.open("ab") as file:
        file.write(b"\xfflf")
    assert ranks(run, lines=2) == ["30%", "ha\ufffdlf"]


@pytest.mark.parametrize(
    ("rank", "attempt", "message"),
    [
        (7, None, r"no log of rank 7; there are those of ranks 0-2$"),
        (2, 2, r"rank-002.log: nothing of attempt 2; there are attempts 1$"),
        (None, 5, r"logs: nothing of attempt 5; there are attempts 1-2$"),
    ],
)
def test_what_is_missing_is_told_with_what_is_there(
    run: RunFiles, rank: int | None, attempt: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(run, rank=rank, attempt=attempt)


def test_a_run_without_logs(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run")
    with pytest.raises(ValueError, match=r"logs: no rank-000.log or other"):
        ranks(run)
    with pytest.raises(ValueError, match=r"slurm: no log of a job"):
        print_job(run.folder, attempt=None, lines=5, is_followed=False, file=io.StringIO())


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 16])
def test_ends_of_files_at_any_block_size(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "BLOCK", block)
    draw = random.Random(block)
    path = tmp_path / "text"
    for _ in range(60):
        content = b"".join(draw.choice([b"\n", b"=== ", b"=== a\n", b"x", b"yy\n"]) for _ in range(draw.randint(0, 12)))
        path.write_bytes(content)
        starts = [0, *(place + 1 for place, byte in enumerate(content) if byte == 10)]
        marked = [place for place in starts if content[place:].startswith(b"=== a")]
        with path.open("rb") as file:
            for before in range(len(content) + 1):
                expected = max((place for place in marked if place < before), default=None)
                assert tail.find_last(file, b"=== a", before=before) == expected
            for count in (1, 2, 5):
                assert tail.last_lines(file, count, start=0, end=len(content)) == content.splitlines()[-count:]


class CountingFile(io.FileIO):
    """A file that counts what is read of it."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        assert content is not None
        self.num_read += len(content)
        return content


def test_a_large_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # as sparse as it is large
        file.seek(1 << 40)
        file.write(b"\n=== attempt 3\nlast\n")
    size = path.stat().st_size
    with CountingFile(path) as file:
        begin = tail.find_last(file, b"=== attempt ", before=size)
        assert begin == (1 << 40) + 1
        assert tail.last_lines(file, 1, start=begin, end=size) == [b"last"]
        assert file.num_read < 4 * tail.BLOCK


TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 5, in step
    loss.backward()
    ^^^^^^^^^^^^^^^
"""


def failed_run(tmp_path: Path) -> RunFiles:
    run = RunFiles(tmp_path / "run")
    run.event("start", 0, nodes="n1,n2")
    run.event("end", 9, status=1, reason="crash", rank=2, node="n2", detail="n2: task 2: Exited with exit code 1")
    for rank in range(4):
        node = f"n{rank // 2 + 1}"
        run.rank_log(rank, header(1, rank, node) + f"[rank{rank}]: ready\n")
        if rank == 2:
            broken = TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory\nGPU 2 has 79 GiB\n"
        else:
            broken = TRACEBACK + f"ConnectionError: rank {rank}, 10.0.0.{rank}:4711{rank}, 0x7f{rank}: closed by peer\n"
        run.rank_log(rank, "".join(f"[rank{rank}]: {line}\n" for line in broken.splitlines()) + "\nlast words\n")
    return run


def test_the_cause_comes_first_and_what_is_the_same_once(tmp_path: Path) -> None:
    run = failed_run(tmp_path)
    indented = [f"  {line}" for line in TRACEBACK.splitlines()]
    assert errors(run) == [
        "attempt 1, job 17: crash: rank 2 on n2: Exited with exit code 1",
        "",
        "rank 2 on n2, the cause:",
        *indented,
        "  torch.OutOfMemoryError: CUDA out of memory",
        "  GPU 2 has 79 GiB",
        "",
        "rank 0 on n1:",
        *indented,
        "  ConnectionError: rank 0, 10.0.0.0:47110, 0x7f0: closed by peer",
        "ranks 1, 3: the same",
    ]


def test_errors_are_those_of_the_newest_attempt_that_failed(tmp_path: Path) -> None:
    run = failed_run(tmp_path)
    run.event("start", 20, nodes="n1,n2", attempt=2)
    for rank in range(4):
        run.rank_log(rank, header(2, rank, "n1") + "ValueError: of the second\n")
    assert errors(run)[0].startswith("attempt 1, job 17: crash")
    assert errors(run)[2] == "rank 2 on n2, the cause:"
    assert "  ValueError: of the second" in errors(run, attempt=2)


def test_a_chain_of_exceptions_is_kept_whole(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run")
    between = "\nThe above exception was the direct cause of the following exception:\n\n"
    chain = TRACEBACK + "KeyError: 'a'\n" + between + TRACEBACK + "ValueError: b\n"
    earlier = TRACEBACK + "OSError: was caught and printed\n\nall is well\n"
    run.rank_log(0, header(1, 0, "n1") + earlier + chain)
    assert errors(run)[2:] == [f"  {line}" for line in chain.splitlines()]


def test_without_a_traceback_lines_that_tell_of_errors(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run")
    run.rank_log(0, header(1, 0, "n1") + "a\nNCCL error: unhandled\nb\nslurmstepd: task 0 Killed\nc\n")
    run.rank_log(1, header(1, 1, "n1") + "step 5\n\n")
    run.rank_log(2, header(1, 2, "n1"))
    assert errors(run) == [
        "",
        "rank 0 on n1:",
        "  NCCL error: unhandled",
        "  slurmstepd: task 0 Killed",
        "",
        "rank 1 on n1: no error; its last line:",
        "  step 5",
        "",
        "rank 2 on n1: no error; its last line:",
        "  (nothing)",
    ]


def test_failures_without_a_rank(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run")
    run.event("start", 0, nodes="n1")
    assert errors(run) == [f"no attempt of {run.folder} has failed"]
    run.event("bad_node", 1, node="n1", reason="no disk")
    run.event("end", 2, status=1, reason="preflight", detail="no disk")
    assert errors(run) == [
        "attempt 1, job 17: preflight: n1: no disk",
        f"its ranks said nothing; `moe-lvlm logs {run.folder} --job` shows what the job did",
    ]


def test_the_log_of_the_batch_script(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "sweep" / "run")
    run.event("start", 0, nodes="n1", job="17")
    run.event("start", 1, nodes="n1", job="18_2", attempt=2)
    run.event("start", 2, nodes="n1", job="19", attempt=3)
    for path, content, at in (
        (run.folder / "slurm" / "job-17.log", "a\nof 17\n", 10),
        (run.folder.parent / "job-18_2.log", "of 18\n", 20),  # a sweep's lie beside its runs
        (run.folder.parent / "job-18_3.log", "of another run\n", 30),
    ):
        path.write_text(content)
        os.utime(path, (at, at))

    def job(attempt: int | None) -> str:
        printed = io.StringIO()
        print_job(run.folder, attempt=attempt, lines=1, is_followed=False, file=printed)
        return printed.getvalue()

    assert job(None) == "of 18\n"
    assert job(1) == "of 17\n"
    with pytest.raises(ValueError, match=r"no attempt 9; there are attempts 1-3"):
        job(9)
    with pytest.raises(ValueError, match=r"no job-19.log, of attempt 3; there are logs of jobs 17, 18_2"):
        job(3)


def test_following_until_the_run_is_done(run: RunFiles) -> None:
    """The files grow while they are followed, one is begun anew, one is new, and the end comes with half a line."""
    seen: list[str] = []
    turns: list[Callable[[], object]] = [
        lambda: run.rank_log(0, "fifth of 0\nsix"),
        lambda: run.rank_log(0, "th of 0\n"),
        lambda: run.rank_log(3, header(2, 3, "n4") + "a new rank\n"),
        lambda: (run.folder / "logs" / "rank-001.log").write_text("anew\n"),
        lambda: (run.rank_log(0, "the last line\nand ha"), (run.folder / "DONE").touch()),
        lambda: run.rank_log(0, "lf a line"),
    ]

    def find() -> dict[Path, str]:
        return {path: path.stem[-1] for path in sorted((run.folder / "logs").iterdir())}

    offsets = {path: path.stat().st_size for path in find()}
    steps = iter(turns)
    follow(
        run.folder,
        find,
        lambda label, line: seen.append(f"{label} {line}"),
        offsets=offsets,
        pause=lambda: next(steps)(),
    )
    assert seen == [
        "0 fifth of 0",
        "0 sixth of 0",
        f"3 {header(2, 3, 'n4').strip()}",
        "3 a new rank",
        "1 anew",
        "0 the last line",
        "0 and half a line",
    ]


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def test_follow_as_a_user(tmp_path: Path) -> None:
    """Started before there is anything, ended by Ctrl-C with status 0."""
    run = RunFiles(tmp_path / "run")
    command = [sys.executable, "-m", "tests.monitoring.commands", "logs", str(run.folder), "--all", "-f"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for_line(process, "nothing in")
        run.rank_log(1, header(1, 1, "n1") + "hello\n")
        wait_for_line(process, "rank 1| hello")
        process.send_signal(2)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()


def test_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert ranges([]) == ""
