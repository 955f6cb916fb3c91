"""The check of the fabric with real processes: what rank 0 says, how each rank ends."""

from __future__ import annotations

import re
import signal
import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.preflight.ranks import NODES, Ranks

pytestmark = pytest.mark.distributed


def test_all_is_well() -> None:
    with Ranks(3) as ranks:
        ranks.start("fabric", "--mib", "2", "--min-gigabytes", "0.0001", ranks=[0, 1, 2])
        status, output, errors = ranks.finish(0)
        assert status == 0, errors
        found = re.fullmatch(r"fabric ok ([0-9]+\.[0-9]{2}) ranks=3 backend=gloo mib=2\n", output)
        assert found is not None, output
        for rank in (1, 2):
            assert ranks.finish(rank)[:2] == (0, "")


def test_a_rank_that_never_comes() -> None:
    with Ranks(3) as ranks:
        ranks.start("fabric", "--timeout", "20", ranks=[0, 2])
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        assert output.splitlines() == [
            "fabric failed rank 1 did not join within 20 s",
            f"{NODES[1]} bad rank 1 did not join within 20 s",
        ]
        assert ranks.finish(2)[0] == 3


def test_a_rank_with_another_version(tmp_path: Path) -> None:
    metadata = tmp_path / "transformers-1.2.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.2.3\n", encoding="utf-8")
    with Ranks(3) as ranks:
        ranks.start("fabric", ranks=[0, 1])
        ranks.start("fabric", ranks=[2], environment={"PYTHONPATH": str(tmp_path)})
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        reason = f"rank 2 has transformers 1.2.3, most have {version('transformers')}"
        assert output.splitlines() == [f"fabric failed {reason}", f"{NODES[2]} bad {reason}"]
        assert [ranks.finish(rank)[0] for rank in (1, 2)] == [3, 3]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_lost_in_the_all_reduce(number: signal.Signals) -> None:
    with Ranks(2) as ranks:
        ranks.start("fabric", "--mib", "512", "--timeout", "20", ranks=[0, 1])
        ranks.wait_for_word("beat/1", "the timing")
        ranks.signal(1, number)
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        assert output.splitlines() == [
            "fabric failed rank 1 stopped answering in the timing",
            f"{NODES[1]} bad rank 1 stopped answering in the timing",
        ]


def test_a_fabric_that_is_too_slow() -> None:
    with Ranks(2) as ranks:
        ranks.start("fabric", "--mib", "1", "--min-gigabytes", "1e6", ranks=[0, 1])
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        assert re.fullmatch(r"fabric failed [0-9.]+ GB/s, asked for 1e\+06 GB/s\n", output), output
        assert ranks.finish(1)[0] == 3


def test_no_rank_0() -> None:
    with Ranks(2) as ranks:
        ranks.start("fabric", "--timeout", "1", ranks=[1])
        status, output, errors = ranks.finish(1)
        assert (status, output) == (3, "")
        assert f"cannot reach rank 0 at {NODES[0]}:{ranks.port}" in errors


def test_a_port_that_is_taken() -> None:
    with Ranks(2) as ranks, socket.socket() as taken:
        taken.bind(("0.0.0.0", ranks.port))
        taken.listen()
        ranks.start("fabric", "--timeout", "1", ranks=[0])
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        failed, bad = output.splitlines()
        assert failed.startswith(f"fabric failed no store at {NODES[0]}:{ranks.port}: ")
        assert bad.startswith(f"{NODES[0]} bad cannot open the store at {NODES[0]}:{ranks.port}: ")


def test_gpus_that_are_asked_for_and_not_there() -> None:
    with Ranks(1) as ranks:
        ranks.start("fabric", "--cuda", ranks=[0], environment={"DS_ACCELERATOR": "cpu"})
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        reason = "rank 0 needs GPU 0, torch sees 0 GPU(s)"
        assert output.splitlines() == [f"fabric failed {reason}", f"{NODES[0]} bad {reason}"]
