"""What binding a model to expert parallelism refuses, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from moe_lvlm.parallel.expert_parallel import bind_expert_parallel, check_deepspeed_version
from moe_lvlm.parallel.process_group import join_world
from tests.parallel.jobs import refusal
from tests.parallel.problems import NUM_EXPERTS, Problem
from tests.parallel.rank_server import RankServer

distributed = pytest.mark.distributed
PROBLEM = Problem()


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "0.19.80"])
def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"deepspeed {version} .*0\.19\.8"):
        check_deepspeed_version()
    with pytest.raises(RuntimeError, match=version):
        bind_expert_parallel(torch.nn.Linear(1, 1), 1, zero_stage=2)


def test_a_local_build_of_the_right_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.8+cu128")
    check_deepspeed_version()


def test_the_installed_deepspeed_is_taken() -> None:
    """Fails on another version: then the contract must be looked at again."""
    check_deepspeed_version()


@distributed
@pytest.mark.parametrize(
    ("world", "size", "said"),
    [
        (2, 4, r"expert_parallel_size: 4 does not divide the number of processes \(2\)"),
        (3, 3, rf"expert_parallel_size: 3 does not divide the {NUM_EXPERTS} experts of model\.language_model"),
    ],
)
def test_sizes_that_do_not_fit(ranks: RankServer, tmp_path: Path, world: int, size: int, said: str) -> None:
    for message in ranks.run(refusal, PROBLEM, size, world=world, folder=tmp_path):
        assert re.search(said, message), message


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"RANK.*but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        join_world()
    assert not dist.is_initialized()
