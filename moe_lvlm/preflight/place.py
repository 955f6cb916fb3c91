"""Where a process stands among those that a launcher started. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LauncherError(ValueError):
    """The launcher's variables do not make a world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """master, port: where the ranks meet; port 0: any that is free. nodes: their names in the order of the ranks, ()
    where they are not known; local_size: ranks on each.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master: str
    port: int
    nodes: Sequence[str]


def read_place(nodes: Sequence[str], *, ranks_are_nodes: bool = False) -> Place:
    """From the environment; without a launcher a world of one.

    ranks_are_nodes: one process on each node, RANK counting nodes.

    Raises:
        LauncherError: a variable is missing, no number or out of range; or the ranks do not share out over the nodes.
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing and len(missing) < len(_NEEDED):
        raise LauncherError(f"the launcher set some of {', '.join(_NEEDED)} but not {', '.join(missing)}")
    if missing:
        return Place(rank=0, size=1, local_rank=0, local_size=1, master="127.0.0.1", port=0, nodes=nodes[:1])
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0, size - 1)
    shared = size // len(nodes) if nodes else size
    local_size = 1 if ranks_are_nodes else _number("LOCAL_WORLD_SIZE", 1, size, absent=shared)
    if nodes and local_size * len(nodes) != size:
        raise LauncherError(
            f"--nodes names {len(nodes)} node(s), of {local_size} rank(s) each, but WORLD_SIZE is {size}"
        )
    local_rank = 0 if ranks_are_nodes else _number("LOCAL_RANK", 0, local_size - 1, absent=rank % local_size)
    port = _number("MASTER_PORT", 1, 65535)
    return Place(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        master=os.environ["MASTER_ADDR"],
        port=port,
        nodes=nodes,
    )


def _number(name: str, least: int, most: int | None = None, *, absent: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and absent is not None:
        return absent
    if text is None or not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise LauncherError(f"{name}: {text!r}; allowed: a whole number, {allowed}")
    return int(text)
