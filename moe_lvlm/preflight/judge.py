"""What rank 0 makes of what the ranks say: who is missing, who differs, who failed, and how fast it went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_lvlm.preflight.allreduce import bus_bandwidth
from moe_lvlm.preflight.meeting import Meeting
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import DEVICE, START, FabricDemands


class Judge:
    """own_work: what rank 0 itself is at."""

    def __init__(self, place: Place, demands: FabricDemands, meeting: Meeting, own_work: Callable[[], str]) -> None:
        self._place = place
        self._demands = demands
        self._meeting = meeting
        self._own_work = own_work
        self._ranks = range(place.size)
        self._nodes: dict[int, str] = {
            rank: place.nodes[rank // place.local_size] for rank in self._ranks if place.nodes
        }

    def judge(self) -> Verdict:
        """Follow the ranks to the end, or to the first failure."""
        here = self._meeting.gather("here", self._ranks, limit=self._demands.limit)
        self._nodes |= {rank: word["node"] for rank, word in here.items()}
        if len(here) < self._place.size:
            return self._blame(self._absent(here), has_lost_contact=True)
        if problem := self._differences(here) or self._without_gpus(here):
            return problem
        backend = "nccl" if here[0]["gpus"] else "gloo"
        self._meeting.store.set("backend", backend)
        results = self._meeting.gather(
            "result",
            self._ranks,
            limit=self._demands.limit,
            end=lambda _: self._meeting.store.check(["failure"]),
        )
        if len(results) < self._place.size or any("failure" in result for result in results.values()):
            return self._failed()
        seconds = max(result["seconds"] for result in results.values())
        return self._speed(seconds, backend)

    def _absent(self, here: Iterable[int]) -> dict[int, str]:
        """By rank: how it is missing."""
        absent = sorted({*self._ranks} - {*here})
        beats = self._meeting.read("beat", absent)
        results = self._meeting.read("result", absent)
        limit = f"within {self._demands.limit:g} s"
        problems = {}
        for rank in absent:
            problems[rank] = f"did not join {limit}"
            if rank in results:
                problems[rank] = f"failed in {START}: {results[rank]['failure']}"
            elif rank in beats or rank == 0:
                problems[rank] = f"did not get past {self._at(rank, beats)} {limit}"
        return problems

    def _at(self, rank: int, beats: Mapping[int, Mapping[str, Any]]) -> str:
        """What a rank was at when it last spoke."""
        if rank == 0:
            return self._own_work()
        return str(beats[rank]["at"]) if rank in beats else START

    def _differences(self, here: Mapping[int, Mapping[str, Any]]) -> Verdict | None:
        """The minority is bad. Where there is none, nobody can be blamed."""
        problems: dict[int, list[str]] = {}
        undecided = []
        for program in here[0]["versions"]:
            found = {rank: here[rank]["versions"][program] for rank in self._ranks}
            ranking = Counter(found.values()).most_common()
            if len(ranking) > 1 and ranking[0][1] == ranking[1][1]:
                by_version = {version: rank for rank, version in reversed(found.items())}
                places = [f"{version} on {self._nodes[rank]}" for version, rank in sorted(by_version.items())]
                undecided.append(f"{program} {', '.join(places)}")
                continue
            usual = ranking[0][0]
            for rank, version in found.items():
                if version != usual:
                    problems.setdefault(rank, []).append(f"{program} {version}, most have {usual}")
        if undecided:
            return Verdict(failure=f"versions differ: {'; '.join(undecided)}")
        if problems:
            return self._blame({rank: f"has {'; '.join(texts)}" for rank, texts in problems.items()})
        return None

    def _without_gpus(self, here: Mapping[int, Mapping[str, Any]]) -> Verdict | None:
        """Either all ranks have a GPU, or none has, as far as torch sees."""
        if not self._demands.needs_cuda and not any(word["gpus"] for word in here.values()):
            return None
        short = {rank: word for rank, word in here.items() if word["gpus"] <= word["local_rank"]}
        if not short:
            return None
        return self._blame(
            {rank: f"needs GPU {word['local_rank']}, torch sees {word['gpus']} GPU(s)" for rank, word in short.items()}
        )

    def _failed(self) -> Verdict:
        """Who failed or hangs in its own GPU is to blame, else who is silent. Of a failed collective all are victims."""
        # This takes a while, in which those who fail like the first say so too.
        silent = self._meeting.silent(self._ranks[1:])
        results = self._meeting.read("result", self._ranks)
        beats = self._meeting.read("beat", self._ranks)
        at = {rank: self._at(rank, beats) for rank in self._ranks}
        failures = {rank: result for rank, result in results.items() if "failure" in result}
        own = {
            rank: f"failed in {result['at']}: {result['failure']}"
            for rank, result in failures.items()
            if result["at"] in (START, DEVICE)
        }
        if own:
            return self._blame(own)
        if silent:
            return self._blame({rank: f"stopped answering in {at[rank]}" for rank in silent}, has_lost_contact=True)
        waiting = [rank for rank in self._ranks if rank not in results]
        hanging = [rank for rank in waiting if at[rank] == DEVICE]
        if hanging:
            return self._blame(dict.fromkeys(hanging, f"hangs in {DEVICE}"))
        if failures:
            rank, result = min(failures.items())
            return Verdict(failure=f"rank {rank} on {self._nodes[rank]} failed in {result['at']}: {result['failure']}")
        usual = Counter(at[rank] for rank in waiting).most_common(1)[0][0]
        return Verdict(failure=f"{usual} did not end within {self._demands.limit:g} s, though all ranks answer")

    def _blame(self, problems: Mapping[int, str], *, has_lost_contact: bool = False) -> Verdict:
        """Name the nodes of ranks with problems. Where rank 0 has lost contact with all of several other nodes, its own:
        rather one node has a broken network than all others at once.
        """
        by_node: dict[str, dict[int, str]] = {}
        for rank, problem in problems.items():
            if rank in self._nodes:
                by_node.setdefault(self._nodes[rank], {})[rank] = problem
        bad = {node: _sentence(each) for node, each in by_node.items()}
        others = self._ranks[self._place.local_size :]
        num_others = len(others) // self._place.local_size
        if has_lost_contact and num_others > 1 and problems.keys() == {*others}:
            bad = {self._nodes[0]: f"none of the {num_others} other nodes answers it"}
        return Verdict(failure=_sentence(problems), bad=bad)

    def _speed(self, seconds: float, backend: str) -> Verdict:
        size, mib, least = self._place.size, self._demands.mib, self._demands.min_gigabytes
        gigabytes = bus_bandwidth(mib=mib, seconds=seconds, size=size)
        if least is not None and size > 1 and gigabytes < least:
            return Verdict(failure=f"{gigabytes:.2f} GB/s, asked for {least:g} GB/s", gigabytes=gigabytes)
        return Verdict(gigabytes=gigabytes, facts={"ranks": str(size), "backend": backend, "mib": str(mib)})


def _sentence(problems: Mapping[int, str]) -> str:
    """Problems by rank, ranks with the same one together."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in problems.items():
        ranks.setdefault(problem, []).append(str(rank))
    return "; ".join(f"rank {', '.join(each)} {problem}" for problem, each in ranks.items())
