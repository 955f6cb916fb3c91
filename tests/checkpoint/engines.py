"""A small sparse model in real DeepSpeed engines, and what the processes of the engine tests do with it."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_lvlm.checkpoint.layout import read_json
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.types import Site

WIDTH, VOCABULARY, EXPERTS = 8, 24, 4
BATCH, SEQUENCE = 4, 6


@dataclass(frozen=True)
class Case:
    """A kind of engine."""

    stage: int
    precision: str = "fp32"
    expert_parallel_size: int = 1
    round_robin: bool = False

    @property
    def name(self) -> str:
        suffix = "-rr" if self.round_robin else ""
        return f"zero{self.stage}-{self.precision}-ep{self.expert_parallel_size}{suffix}"


class Tiny(nn.Module):
    """Embedding (frozen), two sparse layers (the second one's experts frozen), odd sizes, a buffer of each kind."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = MoEConfig.model_validate({"num_experts": EXPERTS, "top_k": 2, "layers": "dense"})
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.sparse = nn.ModuleList()
        for index in range(2):
            experts = Experts(
                num_experts=EXPERTS, model_width=WIDTH, ffn_width=7 + index, activation="silu", has_bias=True
            )
            router = build_router(model_width=WIDTH, config=config)
            self.sparse.append(MoELayer(router=router, experts=experts, site=Site("language_model", index)))
        self.norm = nn.LayerNorm(WIDTH)
        self.odd = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.register_buffer("counted", torch.randint(0, 1000, (5,)))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.embedding.requires_grad_(False)
        self.sparse[1].experts.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        # the first layer's input needs a gradient: a frozen embedding alone would leave the router's input without
        x = self.embedding(ids).requires_grad_()
        for layer in self.sparse:
            x = x + layer(self.norm(x))
        logits = self.head(x) * self.odd.sum()
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def batch(step: int, rank: int) -> Tensor:
    """The same at a step and rank in every run."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)


def make_engine(
    case: Case, seed: int, model: nn.Module | None = None, more_config: Mapping[str, Any] | None = None
) -> Any:
    """An engine of `model` (or a new `Tiny`) with two optimizer groups, accumulation over 2 and active clipping."""
    from deepspeed.utils import groups

    from moe_lvlm.parallel.engine import start_engine
    from moe_lvlm.parallel.expert_parallel import bind_expert_parallel

    # DeepSpeed allows one expert-parallel size a process; the cases follow each other in one
    groups._EXPERT_PARALLEL_GROUP = {}
    groups._EXPERT_DATA_PARALLEL_GROUP = {}
    model = Tiny(seed) if model is None else model
    bind_expert_parallel(model, case.expert_parallel_size, zero_stage=case.stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_groups = [
        {"name": "decay", "params": [p for p in trained if p.dim() > 1], "lr": 3e-3, "weight_decay": 0.1},
        {"name": "plain", "params": [p for p in trained if p.dim() == 1], "lr": 1e-2, "weight_decay": 0.0},
    ]
    zero: dict[str, Any] = {"stage": case.stage, "round_robin_gradients": case.round_robin}
    if case.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 40, "sub_group_size": 150}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.05,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    config |= more_config or {}
    return start_engine(model, optimizer_groups, optimizer_options={"betas": (0.9, 0.98)}, config=config)


def train(engine: Any, first: int, steps: int) -> list[float]:
    """Losses of all micro-batches."""
    losses = []
    for micro in range(2 * first, 2 * (first + steps)):
        loss = engine(batch(micro, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def assemble(path: Path) -> dict[tuple[str, str], Tensor]:
    """Every logical tensor of a checkpoint, whole: by plain reading, with none of the package's readers."""
    files = {file.name: load_file(file) for file in path.glob("rank-*.safetensors")}
    whole = {}
    for name, kinds in read_json(path / "index.json")["tensors"].items():
        for kind, entry in kinds.items():
            pieces = sorted(entry["ranges"])
            values = [files[file][key] for _, _, file, key in pieces]
            assert [start for start, *_ in pieces] == [
                sum(v.numel() for v in values[:i]) for i in range(len(values))
            ], name
            whole[name, kind] = torch.cat(values).view(entry["shape"])
    return whole


def assert_equal(left: Mapping[tuple[str, str], Tensor], right: Mapping[tuple[str, str], Tensor]) -> None:
    """Bit for bit, dtypes too; bf16 weights of the one may be float32 of the other only where they say so."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), (key, (tensor.double() - right[key].double()).abs().max())


def spawn(world_size: int, work: Callable[[Path], None], folder: Path) -> None:
    """Run `work` in each of several processes of one gloo group; an exception in one fails the test."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store-{work.__name__}"
    store.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_enter, args=(world_size, work, folder, store), nprocs=world_size)


def _enter(rank: int, world_size: int, work: Callable[[Path], None], folder: Path, store: Path) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=100)
    )
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for 40 s otherwise
    deepspeed.init_distributed(verbose=False)
    try:
        work(folder)
    except BaseException:
        traceback.print_exc()
        raise
    # no destroy_process_group: a rank that is done early would fail the others
