"""DeepSpeed's hostfile: which nodes there are, how many processes each takes, and which of them a run uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

Slots = Mapping[str, tuple[int, ...]]
_LINE = re.compile(r"(?P<host>[^\s,:@#]+)\s+slots=(?P<slots>\d+)\s*(#.*)?")


class HostfileError(ValueError):
    """A mistake in a hostfile, or a choice of nodes that it does not have."""


def read_hostfile(path: Path) -> Slots:
    """The slots of each host, in the file's order: `host slots=8` a line, with blank lines and # comments between.

    Raises:
        HostfileError: no such file, a line of another form, a host that stands twice, or no host at all.
    """
    if not path.is_file():
        raise HostfileError(f"{path}: no such hostfile; it holds a line a node, such as: node1 slots=8")
    hosts: dict[str, tuple[int, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match["slots"]) == 0:
            raise HostfileError(f"{path}: line {number}: {text!r}; allowed: host slots=N, with N above 0")
        host = match["host"]
        if host in hosts:
            raise HostfileError(f"{path}: line {number}: {host} stands in line {lines[host]} already; allowed: once")
        hosts[host], lines[host] = tuple(range(int(match["slots"]))), number
    if not hosts:
        raise HostfileError(f"{path}: no host in it; it holds a line a node, such as: node1 slots=8")
    return hosts


def choose_slots(
    hosts: Slots,
    *,
    include: str | None = None,
    exclude: str | None = None,
    num_nodes: int | None = None,
    num_processes: int | None = None,
) -> Slots:
    """The slots that a run uses, in the hosts' order.

    Args:
        hosts: what there is.
        include, exclude: these alone, or all but these: HOST[:SLOT,SLOT...], with @ between hosts.
        num_nodes: the first so many hosts.
        num_processes: the first so many slots of each host.

    Raises:
        HostfileError: a host or slot that is not there, a choice that leaves nothing, or two ways to choose at once.
    """
    named = [option for option, value in (("--include", include), ("--exclude", exclude)) if value is not None]
    if num_nodes is not None or num_processes is not None:
        named.append("--num-nodes or --nproc")
    if len(named) > 1:
        raise HostfileError(f"{' with '.join(named)}; allowed: one of them")
    if include is not None:
        chosen = _parse_choice("--include", include, hosts)
        return {host: chosen[host] for host in hosts if host in chosen}
    if exclude is not None:
        dropped = _parse_choice("--exclude", exclude, hosts)
        left = {host: tuple(slot for slot in hosts[host] if slot not in dropped.get(host, ())) for host in hosts}
        if not any(left.values()):
            raise HostfileError(f"--exclude {exclude}: leaves no slot of {', '.join(hosts)}")
        return {host: slots for host, slots in left.items() if slots}
    if num_nodes is not None and num_nodes > len(hosts):
        raise HostfileError(f"--num-nodes {num_nodes}; the hostfile has {len(hosts)}: {', '.join(hosts)}")
    first = dict(list(hosts.items())[:num_nodes])
    for host, slots in first.items():
        if num_processes is not None and num_processes > len(slots):
            raise HostfileError(f"--nproc {num_processes}; slots of {host} in the hostfile: {len(slots)}")
    return {host: slots[:num_processes] for host, slots in first.items()}


def _parse_choice(option: str, text: str, hosts: Slots) -> dict[str, tuple[int, ...]]:
    """HOST[:SLOT,SLOT...][@...]: the slots that it names."""
    chosen: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in hosts:
            raise HostfileError(f"{option}: {host!r} is not in the hostfile; allowed: {', '.join(hosts)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", listed):
            raise HostfileError(f"{option}: {part!r}; allowed: HOST or HOST:SLOT,SLOT..., with @ between hosts")
        slots = tuple(sorted({int(slot) for slot in listed.split(",")})) if colon else hosts[host]
        for slot in slots:
            if slot not in hosts[host]:
                raise HostfileError(f"{option}: {host}:{slot}; {host} has the slots 0 to {len(hosts[host]) - 1}")
        chosen[host] = tuple(sorted({*chosen.get(host, ()), *slots}))
    return chosen
