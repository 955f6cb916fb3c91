"""Nodes two by two with real processes: which one is named."""

from __future__ import annotations

import re
import signal

import pytest

from moe_lvlm.preflight.pairs import rounds_of
from tests.preflight.ranks import NODES, Ranks

# No interface has this name: gloo in this process can talk to nobody, while the process itself is well.
NO_NETWORK = {"GLOO_SOCKET_IFNAME": "none0"}


@pytest.mark.parametrize("num", range(2, 10))
def test_rounds_are_a_ring(num: int) -> None:
    nodes = [10 * index for index in range(num)]
    rounds = rounds_of(nodes)
    assert len(rounds) == {2: 1}.get(num, 2 + num % 2)
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks)), "a node in two pairs at once"
    ring = {frozenset((10 * index, 10 * ((index + 1) % num))) for index in range(num)}
    assert sorted(map(sorted, ring)) == sorted(sorted(pair) for pairs in rounds for pair in pairs)


def test_one_node_has_no_pairs() -> None:
    assert rounds_of([4]) == []


@pytest.mark.distributed
def test_all_pairs_are_good() -> None:
    with Ranks(2) as ranks:
        ranks.start("pairs", "--mib", "1", ranks=[0, 1])
        status, output, errors = ranks.finish(0)
        assert status == 0, errors
        assert re.fullmatch(r"fabric ok [0-9.]+ ranks=2 backend=gloo mib=1\n", output), output
        assert ranks.finish(1)[:2] == (0, "")


@pytest.mark.distributed
def test_a_node_that_reaches_nobody() -> None:
    with Ranks(3) as ranks:
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[0, 2])
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[1], environment=NO_NETWORK)
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        failed, bad = output.splitlines()
        assert failed == f"fabric failed bad: {NODES[1]}"
        # In gloo's own words, of the side where it failed.
        assert re.fullmatch(rf"{NODES[1]} bad failed with {NODES[0]}, {NODES[2]} \(.+ none0\)", bad), bad
        assert ranks.finish(2)[0] == 3


@pytest.mark.distributed
def test_a_node_that_never_comes_and_two_that_are_well() -> None:
    with Ranks(3) as ranks:
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[0, 1])
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        assert output.splitlines() == [
            f"fabric failed bad: {NODES[2]}",
            f"{NODES[2]} bad did not join within 20 s",
        ]


@pytest.mark.distributed
def test_a_node_that_dies_on_the_way() -> None:
    with Ranks(3) as ranks:
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[0, 1, 2])
        ranks.wait_for_word("beat/1", "the pairs")
        ranks.signal(1, signal.SIGKILL)
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        failed, bad = output.splitlines()
        assert failed == f"fabric failed bad: {NODES[1]}"
        assert bad == f"{NODES[1]} bad stopped answering"


@pytest.mark.distributed
def test_two_nodes_cannot_be_told_apart() -> None:
    with Ranks(2) as ranks:
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[0])
        ranks.start("pairs", "--mib", "1", "--timeout", "20", ranks=[1], environment=NO_NETWORK)
        status, output, errors = ranks.finish(0)
        assert status == 3, errors
        assert output.startswith(f"fabric failed two nodes cannot be told apart; {NODES[0]} with {NODES[1]}: "), output
        assert len(output.splitlines()) == 1
