"""Hostfiles: as DeepSpeed reads them, but stricter, and in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.config.hostfile import HostfileError, Slots, choose_slots, read_hostfile

TEXT = """\
# the big ones
node1 slots=4

node2   slots=2   # half of it is broken
10.0.0.3\tslots=1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def hosts(path: Path) -> Slots:
    return read_hostfile(path)


def test_it_is_read_as_deepspeed_does(path: Path, hosts: Slots) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    theirs = fetch_hostfile(str(path))
    assert list(hosts) == list(theirs) == ["node1", "node2", "10.0.0.3"]
    assert {host: len(slots) for host, slots in hosts.items()} == theirs


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        ("node2", None),
        ("10.0.0.3@node1", None),
        ("node1:1,3@node2:0", None),
        ("node1:3,1,1@node1:2", None),
        (None, "node2"),
        (None, "node1:0,1,2@10.0.0.3"),
        (None, "node1:0,1,2,3"),
        (None, None),
    ],
)
def test_it_is_chosen_from_as_deepspeed_does(
    path: Path, hosts: Slots, include: str | None, exclude: str | None
) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    theirs = parse_inclusion_exclusion(fetch_hostfile(str(path)), include or "", exclude or "")
    ours = choose_slots(hosts, include=include, exclude=exclude)
    assert [(host, list(slots)) for host, slots in ours.items()] == list(theirs.items())


def test_the_first_of_each(hosts: Slots) -> None:
    assert choose_slots(hosts, num_nodes=2) == {"node1": (0, 1, 2, 3), "node2": (0, 1)}
    assert choose_slots(hosts, num_nodes=2, num_processes=2) == {"node1": (0, 1), "node2": (0, 1)}
    assert choose_slots(hosts, num_processes=1) == {"node1": (0,), "node2": (0,), "10.0.0.3": (0,)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no host in it"),
        ("# only this\n\n", "no host in it"),
        ("node1", "line 1: 'node1'; allowed: host slots=N"),
        ("node1 slots=4\nnode2 slots=four", "line 2: 'node2 slots=four'"),
        ("node1 slots=0", "line 1: 'node1 slots=0'; allowed: host slots=N, with N above 0"),
        ("node1 slots=4 max_slots=8", "line 1: "),
        ("root@node1 slots=4", "line 1: "),
        ("node1,node2 slots=4", "line 1: "),
        ("node1 slots=4\n\nnode1 slots=4", "line 3: node1 stands in line 1 already"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    with pytest.raises(HostfileError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match="no such hostfile"):
        read_hostfile(tmp_path / "hosts.txt")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": "node9"}, "--include: 'node9' is not in the hostfile; allowed: node1, node2, 10.0.0.3"),
        ({"include": "node2:2"}, "--include: node2:2; node2 has the slots 0 to 1"),
        ({"include": "node2:"}, "--include: 'node2:'; allowed: HOST or HOST:SLOT,SLOT..."),
        ({"exclude": "node2:a"}, "--exclude: 'node2:a'; allowed"),
        ({"exclude": "node1@node2@10.0.0.3"}, "leaves no slot"),
        ({"include": "node1", "exclude": "node2"}, "--include with --exclude; allowed: one of them"),
        ({"exclude": "node1", "num_nodes": 1}, "--exclude with --num-nodes or --nproc; allowed: one of them"),
        ({"num_nodes": 4}, "--num-nodes 4; the hostfile has 3"),
        ({"num_processes": 2}, "--nproc 2; slots of 10.0.0.3 in the hostfile: 1"),
    ],
)
def test_a_choice_that_is_not_there(hosts: Slots, choice: dict[str, Any], expected: str) -> None:
    with pytest.raises(HostfileError) as caught:
        choose_slots(hosts, **choice)
    assert expected in str(caught.value)
