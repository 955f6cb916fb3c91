"""What rank 0 makes of the ranks' words. They lie in a real store, as ranks would have left them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_lvlm.preflight import allreduce, meeting
from moe_lvlm.preflight.judge import Judge
from moe_lvlm.preflight.meeting import Meeting, put
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import DEVICE, GROUP, SUM, FabricDemands

LIMIT = 1.0
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
Words = Mapping[int, Mapping[str, Any]]


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SILENCE", 1.5)


def judge(
    nodes: Sequence[str],
    *,
    local_size: int = 1,
    here: Words,
    results: Words | None = None,
    at: Mapping[int, str] | None = None,
    speaking: Sequence[int] = (),
    own_at: str = SUM,
    needs_cuda: bool = False,
) -> Verdict:
    """The verdict on what ranks have said. at: the last beats. speaking: those that go on beating."""
    size = len(nodes) * local_size
    place = Place(
        rank=0, size=size, local_rank=0, local_size=local_size, master="127.0.0.1", port=0, nodes=tuple(nodes)
    )
    store = Meeting(place, limit=LIMIT)
    for name, words in (("here", here), ("result", results or {})):
        for rank, word in words.items():
            put(store.store, name, rank, word)
            if "failure" in word:
                store.store.set("failure", "")
    beats = {rank: {"count": 0, "at": phase} for rank, phase in (at or {}).items()}
    for rank, beat in beats.items():
        put(store.store, "beat", rank, beat)
    with _beating(store, {rank: beats[rank]["at"] for rank in speaking}):
        demands = FabricDemands(mib=64, limit=LIMIT, needs_cuda=needs_cuda)
        return Judge(place, demands, store, lambda: own_at).judge()


@contextmanager
def _beating(store: Meeting, at: Mapping[int, Any]) -> Iterator[None]:
    connection, stop = store.connect(), threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.1):
            count += 1
            for rank, phase in at.items():
                put(connection, "beat", rank, {"count": count, "at": phase})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def words(nodes: Sequence[str], *, gpus: int = 0, local_size: int = 1) -> dict[int, dict[str, Any]]:
    """Introductions of ranks that are well."""
    ranks = range(len(nodes) * local_size)
    return {
        rank: {
            "node": nodes[rank // local_size],
            "versions": VERSIONS,
            "gpus": gpus,
            "local_rank": rank % local_size,
        }
        for rank in ranks
    }


def without(words: Words, *ranks: int) -> dict[int, Mapping[str, Any]]:
    return {rank: word for rank, word in words.items() if rank not in ranks}


def changed(words: dict[int, dict[str, Any]], rank: int, **entries: Any) -> dict[int, dict[str, Any]]:
    return words | {rank: words[rank] | entries}


TWO, THREE, FOUR = ["n1", "n2"], ["n1", "n2", "n3"], ["n1", "n2", "n3", "n4"]


def test_the_speed_is_the_slowest_ranks() -> None:
    results = {rank: {"seconds": seconds} for rank, seconds in enumerate([0.01, 0.02, 0.005, 0.01])}
    verdict = judge(FOUR, here=words(FOUR), results=results)
    # 64 MiB = 67108864 bytes in 20 ms are 3.3554432 GB/s; a ring of four carries 2 * 3 / 4 of it on each link.
    assert verdict.gigabytes == pytest.approx(5.0331648)
    assert verdict.lines() == ["fabric ok 5.03 ranks=4 backend=gloo mib=64"]


def test_ranks_of_a_node_are_named_together() -> None:
    verdict = judge(THREE, local_size=2, here=without(words(THREE, local_size=2), 2, 3))
    reason = "rank 2, 3 did not join within 1 s"
    assert verdict.lines() == [f"fabric failed {reason}", f"n2 bad {reason}"]


def test_a_node_that_nobody_reaches_is_bad_rather_than_all_others() -> None:
    verdict = judge(THREE, here=without(words(THREE), 1, 2))
    assert verdict.failure == "rank 1, 2 did not join within 1 s"
    assert verdict.bad == {"n1": "none of the 2 other nodes answers it"}


def test_of_two_nodes_the_other_is_bad() -> None:
    verdict = judge(TWO, here=without(words(TWO), 1))
    assert verdict.bad == {"n2": "rank 1 did not join within 1 s"}


def test_a_rank_that_lives_and_does_not_join() -> None:
    verdict = judge(THREE, here=without(words(THREE), 1), at={1: "the search for GPUs"}, speaking=[1])
    assert verdict.bad == {"n2": "rank 1 did not get past the search for GPUs within 1 s"}


def test_a_rank_whose_search_for_gpus_fails() -> None:
    results = {1: {"failure": "CUDA unknown error", "at": "the search for GPUs"}}
    verdict = judge(THREE, here=without(words(THREE), 1), results=results)
    assert verdict.bad == {"n2": "rank 1 failed in the search for GPUs: CUDA unknown error"}


def test_versions_of_which_no_one_is_usual() -> None:
    here = changed(words(TWO), 1, versions=VERSIONS | {"torch": "2.11.0"})
    verdict = judge(TWO, here=here)
    assert verdict.failure == "versions differ: torch 2.11.0 on n2, 2.13.0 on n1"
    assert verdict.bad == {}


def test_a_master_with_other_versions() -> None:
    here = changed(words(THREE), 0, versions=VERSIONS | {"torch": "2.11.0", "python": "3.12.3"})
    verdict = judge(THREE, here=here)
    assert verdict.bad == {"n1": "rank 0 has python 3.12.3, most have 3.11.7; torch 2.11.0, most have 2.13.0"}


def test_a_node_where_torch_sees_fewer_gpus() -> None:
    here = words(TWO, gpus=2, local_size=2)
    here = changed(changed(here, 2, gpus=1), 3, gpus=1)
    verdict = judge(TWO, local_size=2, here=here)
    assert verdict.bad == {"n2": "rank 3 needs GPU 1, torch sees 1 GPU(s)"}


def test_no_gpus_where_they_are_needed() -> None:
    verdict = judge(TWO, here=words(TWO), needs_cuda=True)
    assert verdict.bad == {
        "n1": "rank 0 needs GPU 0, torch sees 0 GPU(s)",
        "n2": "rank 1 needs GPU 0, torch sees 0 GPU(s)",
    }


def test_a_gpu_that_fails_is_to_blame_whoever_is_silent() -> None:
    results = {1: {"failure": "CUDA error: uncorrectable ECC error encountered", "at": DEVICE}}
    verdict = judge(
        THREE, here=words(THREE, gpus=1), results=results, at={1: DEVICE, 2: DEVICE}, speaking=[1], own_at=GROUP
    )
    reason = f"rank 1 failed in {DEVICE}: CUDA error: uncorrectable ECC error encountered"
    assert verdict.lines() == [f"fabric failed {reason}", f"n2 bad {reason}"]


def test_a_gpu_that_hangs() -> None:
    verdict = judge(THREE, here=words(THREE, gpus=1), at={1: GROUP, 2: DEVICE}, speaking=[1, 2], own_at=GROUP)
    assert verdict.bad == {"n3": f"rank 2 hangs in {DEVICE}"}


def test_a_silent_rank_is_to_blame_and_not_its_victims() -> None:
    results = {rank: {"failure": "Connection closed by peer", "at": SUM} for rank in (0, 2)}
    verdict = judge(THREE, here=words(THREE), results=results, at={1: SUM, 2: SUM}, speaking=[2])
    assert verdict.bad == {"n2": f"rank 1 stopped answering in {SUM}"}


def test_all_others_fall_silent_at_once() -> None:
    verdict = judge(THREE, here=words(THREE), at={1: SUM, 2: SUM})
    assert verdict.failure == f"rank 1, 2 stopped answering in {SUM}"
    assert verdict.bad == {"n1": "none of the 2 other nodes answers it"}


def test_victims_alone_name_nobody() -> None:
    results = {2: {"failure": "unhandled system error", "at": SUM}}
    verdict = judge(THREE, here=words(THREE), results=results, at={1: SUM, 2: SUM}, speaking=[1, 2])
    assert verdict.lines() == [f"fabric failed rank 2 on n3 failed in {SUM}: unhandled system error"]


def test_an_all_reduce_that_does_not_end() -> None:
    verdict = judge(THREE, here=words(THREE), at={1: SUM, 2: SUM}, speaking=[1, 2])
    assert verdict.lines() == [f"fabric failed {SUM} did not end within 1 s, though all ranks answer"]


def test_sums_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [0.0, 1.0]

    def all_reduce(numbers: torch.Tensor) -> None:
        """Add what rank 1 of 3 holds, i % 1000 + 1, and rank 2's i % 1000 + 2; then an error to one sum."""
        numbers += 2 * (torch.arange(len(numbers)) % 1000) + 3
        numbers[77] += errors.pop(0)

    monkeypatch.setattr(allreduce.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(allreduce.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(allreduce.dist, "all_reduce", all_reduce)
    allreduce.check_sum(torch.device("cpu"))
    with pytest.raises(allreduce.TestError, match="1 of 262144 sums are wrong"):
        allreduce.check_sum(torch.device("cpu"))
