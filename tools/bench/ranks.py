"""Expert parallelism over real processes on this machine: each has its own tokens, and a share of the experts.

All group sizes run in one start, interleaved: a round runs our layer and the dense floor on 1, 2, 4, ... processes at a
time, the others waiting.
"""

from __future__ import annotations

import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from bench.counts import CountExchanges, count_syncs
from bench.layers import DenseFloor, ours_expert_parallel
from bench.measure import interleave, ratio_and_spread, run_once
from bench.problem import DTYPES, Problem, Sizes, draw_problem, with_load
from bench.rivals import UnavailableError

_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksJob:
    """What every process is told. ranks: group sizes, ascending. device, dtype, clock: as options name them."""

    sizes: Sizes
    ranks: tuple[int, ...]
    dtype: str
    device: str
    clock: str
    threads: int
    repeats: int
    warmup: int
    seed: int


def measure_ranks(job: RanksJob) -> list[dict[str, Any]]:
    """A point for each group size: ratio of the slowest rank's time to that of the first size, and what rank 0 sends.

    Raises:
        UnavailableError: fewer GPUs than processes.
        ValueError: a size that does not divide the experts.
    """
    for size in job.ranks:
        if size < 1 or job.sizes.experts % size:
            raise ValueError(f"--points: ranks={size}; allowed: what divides the experts ({job.sizes.experts})")
    if job.device != "cpu" and torch.cuda.device_count() < max(job.ranks):
        raise UnavailableError(f"{max(job.ranks)} processes need as many GPUs; torch sees {torch.cuda.device_count()}")
    # one process imports what takes long, and each rank is forked from it
    multiprocessing.set_forkserver_preload(["torch", "moe_lvlm.moe.layer"])
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            _run_rank,
            args=(job, folder),
            nprocs=max(job.ranks),
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not context.join():
                pass
        finally:
            for process in context.processes:
                process.terminate()
                process.join()
        points: list[dict[str, Any]] = json.loads((Path(folder) / "points.json").read_text())
    return points


def _run_rank(rank: int, job: RanksJob, folder: str) -> None:
    """One process; rank 0 writes the points."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started this one, which ends it
    torch.set_num_threads(job.threads)
    device = torch.device(job.device if job.device == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=max(job.ranks),
        timeout=_TIMEOUT,
    )
    groups = {size: dist.new_group(list(range(size))) for size in job.ranks}
    problem = _own_problem(job, rank, device)
    floor = DenseFloor(problem).train()
    layers = {
        size: ours_expert_parallel(problem, group, rank=rank, size=size).train()
        for size, group in groups.items()
        if rank < size
    }
    runs: dict[str, Callable[[], float]] = {}
    for size, group in groups.items():
        layer = layers.get(size)
        runs[f"ours {size}"] = partial(_time_together, layer, problem, group, job)
        runs[f"dense {size}"] = partial(_time_together, None if layer is None else floor, problem, group, job)
    timings = interleave(runs, repeats=job.repeats, warmup=job.warmup, seed=job.seed)
    counted = {size: _count(layer, problem) for size, layer in layers.items()}
    if rank == 0:
        points = [_point(size, timings.seconds, job.ranks[0], counted[size]) for size in job.ranks]
        (Path(folder) / "points.json").write_text(json.dumps(points))
    dist.barrier()
    dist.destroy_process_group()


def _own_problem(job: RanksJob, rank: int, device: torch.device) -> Problem:
    """Every rank's weights are the same, its tokens its own; the load is even."""
    problem = draw_problem(replace(job.sizes, tail_share=0.0), dtype=DTYPES[job.dtype], device=device, seed=job.seed)
    generator = torch.Generator().manual_seed(job.seed + 1 + rank)
    x_BSD = torch.randn(problem.x_BSD.shape, generator=generator).to(problem.x_BSD)
    return with_load(replace(problem, x_BSD=x_BSD), None, seed=job.seed + 1 + rank)


def _time_together(layer: nn.Module | None, problem: Problem, group: dist.ProcessGroup, job: RanksJob) -> float:
    """Seconds of the slowest rank of the group; 0 outside it (layer: None)."""
    if layer is None:
        return 0.0
    dist.barrier(group)
    clock = time.process_time if job.clock == "cpu" else time.perf_counter
    seconds = torch.tensor(run_once(layer, problem, clock), dtype=torch.float64, device=problem.x_BSD.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return float(seconds)


def _count(layer: nn.Module, problem: Problem) -> dict[str, Any]:
    """What one pass exchanges, and how often the host waits (None on a CPU). All ranks of the group call it."""

    def run() -> None:
        layer(problem.x_BSD.detach().requires_grad_()).backward(problem.grad_BSD)

    host_syncs = count_syncs(run) if problem.x_BSD.device.type == "cuda" else None
    with CountExchanges() as counter:
        run()
    layer.zero_grad(set_to_none=True)
    exchanges = counter.exchanges
    return {
        "exchanges": exchanges.count,
        "sent_mib": exchanges.sent_mib,
        "other_collectives": exchanges.others,
        "host_syncs": host_syncs,
    }


def _point(size: int, seconds: dict[str, list[float]], first: int, counted: dict[str, Any]) -> dict[str, Any]:
    ours, dense = seconds[f"ours {size}"], seconds[f"dense {size}"]
    ratio, spread = ratio_and_spread(ours, seconds[f"ours {first}"])
    return {
        "value": size,
        "ratio": ratio,
        "spread": spread,
        "ratio_to_dense": ratio_and_spread(ours, dense)[0],
        "floor_ratio": ratio_and_spread(dense, seconds[f"dense {first}"])[0],
        "goal": None,
        "milliseconds": 1e3 * statistics.median(ours),
        **counted,
    }
