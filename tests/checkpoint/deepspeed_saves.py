"""Processes that save one moment of a run twice: by DeepSpeed's engine.save_checkpoint, and by our save_checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lvlm.checkpoint.deepspeed_import import DeepSpeedCheckpoint, open_deepspeed
from moe_lvlm.checkpoint.ranks import GroupRanks
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rewrite import write_checkpoint
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.moe.experts import Experts
from tests.checkpoint.engines import EXPERTS, VOCABULARY, WIDTH, Case, Tiny, make_engine, train

STEPS = 2
TAG = "step"
CLIENT_STATE = {"cursor": [3, 4], "note": "half way", "odd": torch.ones(2)}


@dataclass(frozen=True)
class WideCase(Case):
    """bf16 with gradients in float32, for which ZeRO 1 has an optimizer of its own (BF16_Optimizer)."""

    @property
    def name(self) -> str:
        return f"{super().name}-wide"


PAIR: list[Case] = [
    # first: a ZeRO 3 engine replaces torch's linear function in its process, whose bf16 rounding then differs
    Case(3, "fp32", 2),
    Case(0),
    Case(1),
    Case(1, "bf16", 2),
    Case(2, "fp32", 2),
    Case(2, "bf16", round_robin=True),
    Case(3, "bf16"),
    WideCase(1, "bf16"),
]
FOUR: list[Case] = [Case(1, "fp32", 2), Case(2, "bf16", 4), Case(3, "bf16", 2)]


@dataclass(frozen=True)
class StockCase:
    """A model of deepspeed.moe.layer.MoE. expert: "gated", "two_layer" or "other"."""

    stage: int
    expert_parallel_size: int
    expert: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"stock-zero{self.stage}-{self.precision}-ep{self.expert_parallel_size}-{self.expert}"


STOCK_PAIR = [StockCase(1, 1, "gated"), StockCase(2, 2, "gated"), StockCase(1, 2, "other")]
STOCK_FOUR = [StockCase(2, 2, "two_layer", "bf16")]


def tiny(case: Case, seed: int) -> nn.Module:
    """`Tiny` with a parameter under two names, frozen only where DeepSpeed can save it."""
    model = Tiny(seed)
    # the same parameter in another module, as tied embeddings are
    model.tied = nn.Module()
    model.tied.weight = model.odd
    if case.stage == 0:
        # names of frozen parameters are not told from others there
        model.requires_grad_(True)
    if case.expert_parallel_size > 1:
        for index, layer in enumerate(model.sparse):
            if case.precision == "fp32":  # what DeepSpeed's converter to universal checkpoints can take
                layer.experts = Experts(
                    num_experts=EXPERTS, model_width=WIDTH, ffn_width=7 + index, activation="silu", has_bias=False
                )
                for parameter in layer.experts.parameters():
                    parameter.data = 0.1 * torch.randn_like(parameter)
            # it saves the first rank's share of frozen biases, and at ZeRO 3 no frozen experts
            for name, parameter in layer.experts.named_parameters():
                is_trained = index == 0 or case.precision == "fp32" or case.stage == 3 or name.startswith("b")
                parameter.requires_grad_(is_trained)
    return model


def engine_of(case: Case, seed: int, model_of: Case | None = None) -> Any:
    """An engine whose learning rates rise over the first steps. model_of: the case whose model it is, if another."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    wide = {"data_types": {"grad_accum_dtype": "fp32"}} if isinstance(case, WideCase) else {}
    engine = make_engine(case, seed, tiny(model_of or case, seed), wide)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    engine.lr_scheduler = WarmupLR(engine.optimizer, 0.0, rates, warmup_num_steps=7)
    return engine


def save_twice(folder: Path, name: str, engine: Any) -> None:
    from moe_lvlm.checkpoint.engine import live_engine

    engine.save_checkpoint(str(folder / "deepspeed" / name), tag=TAG, client_state=CLIENT_STATE)
    save_checkpoint(
        folder / "ours",
        name,
        live_engine(engine),
        config={},
        state={"global_step": STEPS},
        rng={},
        ranks=GroupRanks(),
        log=print,
    )


def write(folder: Path, name: str, checkpoint: DeepSpeedCheckpoint) -> Path:
    """An imported checkpoint as one of ours."""
    state = {
        "global_step": checkpoint.global_steps,
        "engine": checkpoint.engine,
        "learning_rates": checkpoint.learning_rates,
        "saved_world_size": checkpoint.world_size,
    }
    return write_checkpoint(folder, name, checkpoint.tensors, config={}, state=state, num_files=2, log=print).path


def save_cases(folder: Path, cases: list[Case]) -> None:
    """Save each case after some steps, and write down the losses of the steps that follow."""
    for case in cases:
        name = f"world{dist.get_world_size()}-{case.name}"
        engine = engine_of(case, seed=1)
        train(engine, 0, STEPS)
        save_twice(folder, name, engine)
        losses = train(engine, STEPS, 1)
        (folder / f"{name}-rank{dist.get_rank()}.json").write_text(json.dumps(losses))
        engine.destroy()


def save_four(folder: Path) -> None:
    """All that four processes do."""
    save_cases(folder, FOUR)
    for case in STOCK_FOUR:
        save_stock(folder, case)


def save_pair(folder: Path) -> None:
    """All that two processes do; comes after `save_four`."""
    save_cases(folder, PAIR)
    for case in STOCK_PAIR:
        save_stock(folder, case)
    save_wrapped(folder)
    if dist.get_rank() == 0:
        import_all(folder)
    dist.barrier()
    continue_pair(folder)


# ---- models of DeepSpeed's own MoE layer


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 5, bias=False)
        self.up_proj = nn.Linear(WIDTH, 5, bias=False)
        self.down_proj = nn.Linear(5, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class TwoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 5)
        self.fc2 = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class Stock(nn.Module):
    """Embedding, a layer of MoE whose experts are trained and one whose experts are frozen, head."""

    def __init__(self, case: StockCase, seed: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(seed)
        kind = {"gated": Gated, "two_layer": TwoLayer, "other": Other}[case.expert]
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            MoE(
                WIDTH,
                kind(),
                num_experts=EXPERTS,
                ep_size=case.expert_parallel_size,
                k=1,
                capacity_factor=4.0,
                min_capacity=BATCH_TOKENS,
                use_rts=False,
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        rank = dist.get_rank() % case.expert_parallel_size
        for index, layer in enumerate(self.layers):
            for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                number = rank * layer.num_local_experts + local
                torch.manual_seed(1000 * seed + 10 * index + number)
                for parameter in expert.parameters():
                    parameter.data = torch.randn_like(parameter) * 0.1
        self.layers[1].deepspeed_moe.experts.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        logits = self.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


BATCH_TOKENS = 24


def stock_engine(case: StockCase, seed: int) -> Any:
    from deepspeed.utils import groups

    from moe_lvlm.parallel.engine import start_engine

    groups._EXPERT_PARALLEL_GROUP = {}
    groups._EXPERT_DATA_PARALLEL_GROUP = {}
    model = Stock(case, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    return start_engine(
        model, [{"name": "all", "params": trained, "lr": 2e-3}], optimizer_options={"betas": (0.9, 0.98)}, config=config
    )


def save_stock(folder: Path, case: StockCase) -> None:
    """Save by DeepSpeed; beside it each rank's masters and moments, as DeepSpeed's own functions put them together."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.tensor_fragment import get_full_hp_param

    engine = stock_engine(case, seed=5)
    train(engine, 0, STEPS)
    name = f"world{dist.get_world_size()}-{case.name}"
    engine.save_checkpoint(str(folder / "deepspeed" / name), tag=TAG)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    live: dict[tuple[str, str], Tensor] = {}
    for parameter_name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            live[parameter_name, "weight"] = parameter.detach().clone()
            continue
        live[parameter_name, "master"] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            live[parameter_name, kind] = get_full_hp_param(parameter, kind).clone()
    torch.save(live, folder / f"{name}-live{dist.get_rank()}.pt")
    engine.destroy()


# ---- training without ZeRO in bf16, whose masters ours do not save


def save_wrapped(folder: Path) -> None:
    """Save by DeepSpeed; beside it masters and moments by name, out of the live optimizer."""
    engine = engine_of(WRAPPED, seed=1)
    train(engine, 0, STEPS)
    engine.save_checkpoint(str(folder / "deepspeed" / "wrapped"), tag=TAG)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    live: dict[tuple[str, str], Tensor] = {}
    wrapper = engine.optimizer
    for parameters, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            state = wrapper.optimizer.state[master]
            for kind, tensor in {"master": master, **state}.items():
                if kind != "step":
                    live[names[id(parameter)], kind] = tensor.detach().clone()
    if dist.get_rank() == 0:
        torch.save(live, folder / "wrapped-live.pt")
    engine.destroy()


WRAPPED = Case(0, "bf16")


# ---- continuing from imported checkpoints


def import_all(folder: Path) -> None:
    """Write every checkpoint of DeepSpeed as one of ours."""
    for path in sorted((folder / "deepspeed").glob("world*-zero*")):
        write(folder / "imported", path.name, open_deepspeed(path))


def continue_pair(folder: Path) -> None:
    """Restore imported checkpoints in engines of the same and of other topologies, and write down the losses."""
    from moe_lvlm.checkpoint.engine import live_engine

    for source, saved_by, case in CONTINUED:
        engine = engine_of(case, seed=2, model_of=saved_by)
        restore_training_state(live_engine(engine), Checkpoint(folder / "imported" / source))
        assert engine.global_steps == STEPS
        losses = train(engine, STEPS, 1)
        (folder / f"{source}-to-{case.name}-rank{dist.get_rank()}.json").write_text(json.dumps(losses))
        engine.destroy()


CONTINUED: list[tuple[str, Case, Case]] = [
    *((f"world2-{case.name}", case, case) for case in PAIR),
    ("world2-zero3-fp32-ep2", Case(3, "fp32", 2), Case(2, "fp32", 2)),
    ("world2-zero3-fp32-ep2", Case(3, "fp32", 2), Case(3, "fp32", 1)),
    ("world4-zero1-fp32-ep2", Case(1, "fp32", 2), Case(2, "fp32", 1)),
]
