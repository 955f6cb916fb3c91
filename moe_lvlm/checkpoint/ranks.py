"""How the ranks of a run agree while they save: one collective, an all-gather of small objects."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed


class SaveError(RuntimeError):
    """A save that did not take place. Raised on all ranks; the previous checkpoint is as it was."""


class Ranks(Protocol):
    """The processes that write one checkpoint together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Also a barrier."""
        ...


class SingleRank:
    """One process, no process group."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class GroupRanks:
    """The members of a torch process group (None: all). Hand in a gloo group where the default one is NCCL."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = torch.distributed.get_rank(group)
        self.world_size = torch.distributed.get_world_size(group)

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def current_ranks() -> Ranks:
    """All processes of the run, or the only one."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return GroupRanks() if is_distributed else SingleRank()


def agree(ranks: Ranks, error: Exception | None, phase: str) -> None:
    """Wait for all; if any rank brings an error, raise SaveError on all, naming each such rank and the phase."""
    texts = ranks.all_gather(None if error is None else f"{type(error).__name__}: {error}")
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failures:
        raise SaveError(f"checkpoint not saved, failed to {phase}: {'; '.join(failures)}") from error
