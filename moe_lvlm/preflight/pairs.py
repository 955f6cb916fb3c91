"""Which node is it? Where all ranks together failed or were slow, nodes are tested two by two, along a ring."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_lvlm.preflight.allreduce import bus_bandwidth
from moe_lvlm.preflight.ending import FAILED
from moe_lvlm.preflight.meeting import LATER, Beats, Meeting, put
from moe_lvlm.preflight.pair import RESULT, START_LIMIT, Side
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.programs import run_program
from moe_lvlm.preflight.session import conclude, open_meeting
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import FabricDemands, name_of

Pair = tuple[int, int]
_MOST_ROUNDS = 3


def rounds_of(nodes: Sequence[int]) -> list[list[Pair]]:
    """The ring's pairs, each node in at most one pair of a round: two rounds, a third that closes an odd ring."""
    num = len(nodes)
    if num < 2:
        return []
    ring = [(nodes[i], nodes[(i + 1) % num]) for i in range(num if num > 2 else 1)]
    last = ring[num - 1 :] if num % 2 else []
    ring = ring[: num - 1] if num % 2 else ring
    return [pairs for pairs in (ring[0::2], ring[1::2], last) if pairs]


def check_pairs(place: Place, demands: FabricDemands, say: Callable[[Verdict], None]) -> int:
    """Take part as one of the nodes, `place.rank` counting nodes; rank 0 says the verdict. Returns the exit status, 0
    or 3. The caller ends the process with os._exit.
    """
    meeting = open_meeting(place, demands.limit, say)
    if meeting is None:
        return FAILED
    has_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    put(meeting.store, "here", place.rank, {"node": name_of(place), "gpu": has_gpu})
    threading.Thread(target=_take_part, args=(place, demands, meeting.connect(), meeting.port), daemon=True).start()
    if place.rank > 0:
        return meeting.attend(lambda: "the pairs", limit=(_MOST_ROUNDS + 1) * (demands.limit + START_LIMIT + 2 * LATER))
    verdict = _judge(place, demands, meeting)
    return conclude(meeting, verdict, say)


def _take_part(place: Place, demands: FabricDemands, store: dist.TCPStore, port: int) -> None:
    """Run this node's side of each round that rank 0 calls."""
    for index in range(_MOST_ROUNDS):
        store.wait([f"round/{index}"], timedelta(seconds=(index + 1) * (demands.limit + START_LIMIT + 2 * LATER)))
        call = json.loads(store.get(f"round/{index}"))
        for pair in call["pairs"]:
            if place.rank in pair:
                side = Side(
                    side=pair.index(place.rank),
                    host=call["hosts"][str(pair[0])],
                    master=place.master,
                    port=port,
                    key=f"port/{index}/{pair[0]}",
                    backend=call["backend"],
                    mib=demands.mib,
                    limit=demands.limit,
                )
                put(store, f"pair/{index}", place.rank, _run_side(side))


def _run_side(side: Side) -> dict[str, Any]:
    answer = run_program(side.command(), limit=side.limit + START_LIMIT)
    for line in answer.text.splitlines():
        if answer.status == 0 and line.startswith(RESULT):
            return {"seconds": float(line.removeprefix(RESULT))}
    if answer.status is None:
        return {"failure": f"no end within {side.limit + START_LIMIT:g} s"}
    return {"failure": answer.last_line or f"ended with status {answer.status}"}


def _judge(place: Place, demands: FabricDemands, meeting: Meeting) -> Verdict:
    here = meeting.gather("here", range(place.size), limit=demands.limit)
    names = dict(enumerate(place.nodes)) | {rank: here[rank]["node"] for rank in here}
    bad = {rank: f"did not join within {demands.limit:g} s" for rank in range(place.size) if rank not in here}
    has_gpus = demands.needs_cuda or any(word["gpu"] for word in here.values())
    if has_gpus:
        bad |= {rank: "torch sees no GPU" for rank, word in here.items() if not word["gpu"]}
    present = [rank for rank in here if rank not in bad]
    backend = "nccl" if has_gpus else "gloo"
    problems: dict[Pair, str] = {}
    speeds: dict[Pair, float] = {}
    for index, ring in enumerate(rounds_of(present)):
        pairs = [pair for pair in ring if not bad.keys() & {*pair}]
        meeting.store.set(f"round/{index}", json.dumps({"pairs": pairs, "backend": backend, "hosts": names}))
        words = _answers(meeting, index, pairs, demands)
        bad |= {rank: "stopped answering" for pair in pairs for rank in pair if rank not in words}
        for pair in pairs:
            if bad.keys() & {*pair}:
                continue  # says nothing of the other
            found = _outcome([words[rank] for rank in pair], demands)
            if isinstance(found, str):
                problems[pair] = found
            else:
                speeds[pair] = found
    for rank, pair_problems in _guilty(present, problems, has_good_pair=bool(speeds)).items():
        bad.setdefault(rank, f"failed with {_list(pair_problems, rank, names)}")
    facts = {"ranks": str(len(present)), "backend": backend, "mib": str(demands.mib)}
    slowest = min(speeds.values(), default=None)
    if not bad and not problems:
        return Verdict(gigabytes=slowest, facts=facts)
    named = {names.get(rank, f"node {rank}"): reason for rank, reason in sorted(bad.items())}
    return Verdict(failure=_failure(named, problems, names, has_good_pair=bool(speeds)), bad=named)


def _answers(meeting: Meeting, index: int, pairs: Sequence[Pair], demands: FabricDemands) -> dict[int, dict[str, Any]]:
    """What the nodes say of a round: all of them, or those that still speak."""
    ranks = [rank for pair in pairs for rank in pair]
    beats = Beats(meeting, ranks)
    limit = demands.limit + START_LIMIT + LATER
    return meeting.gather(f"pair/{index}", ranks, limit=limit, end=lambda missing: missing <= beats.silent())


def _outcome(words: Sequence[Mapping[str, Any]], demands: FabricDemands) -> float | str:
    """Gigabytes a second of a pair, or what is wrong with it."""
    failures = [str(word["failure"]) for word in words if "failure" in word]
    if failures:
        return failures[0]
    gigabytes = bus_bandwidth(mib=demands.mib, seconds=max(word["seconds"] for word in words), size=2)
    if demands.min_gigabytes is not None and gigabytes < demands.min_gigabytes:
        return f"{gigabytes:.2f} GB/s, asked for {demands.min_gigabytes:g} GB/s"
    return gigabytes


def _guilty(nodes: Sequence[int], problems: Mapping[Pair, str], *, has_good_pair: bool) -> dict[int, dict[Pair, str]]:
    """Nodes none of whose pairs is good while some other is, with those pairs."""
    if not has_good_pair:
        return {}
    pairs = {node: [pair for each in rounds_of(nodes) for pair in each if node in pair] for node in nodes}
    return {
        node: {pair: problems[pair] for pair in each}
        for node, each in pairs.items()
        if all(pair in problems for pair in each)
    }


def _list(problems: Mapping[Pair, str], node: int, names: Mapping[int, str]) -> str:
    """With whom the node failed, and how; those with whom it failed alike together."""
    partners: dict[str, list[str]] = {}
    for (one, other), problem in problems.items():
        partners.setdefault(problem, []).append(names[one if other == node else other])
    return "; ".join(f"{', '.join(sorted(others))} ({problem})" for problem, others in partners.items())


def _failure(
    bad: Mapping[str, str], problems: Mapping[Pair, str], names: Mapping[int, str], *, has_good_pair: bool
) -> str:
    if bad:
        return f"bad: {', '.join(bad)}"
    (one, other), problem = next(iter(problems.items()))
    link = f"{names[one]} with {names[other]}: {problem}"
    if has_good_pair:
        return f"between good nodes, {link}"
    if len(problems) == 1:
        return f"two nodes cannot be told apart; {link}"
    return f"no pair is good, nodes cannot be told apart; {link}"
