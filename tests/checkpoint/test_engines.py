"""Real engines, real processes: a resumed run is the unbroken one bit for bit, and topologies can be exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import GroupRanks, SaveError, SingleRank
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import SaveReport, save_checkpoint
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.checkpoint.verify import verify
from tests.checkpoint.engines import EXPERTS, Case, Tiny, assemble, assert_equal, batch, make_engine, spawn, train

pytestmark = pytest.mark.distributed

CASES = [
    *(Case(stage, precision, size) for stage in (1, 2, 3) for precision in ("fp32", "bf16") for size in (1, 2)),
    Case(0, "fp32", 1),
    Case(0, "fp32", 2),
    Case(2, "bf16", 1, round_robin=True),
]


def save(folder: Path, name: str, engine: Any, step: int) -> SaveReport:
    from moe_lvlm.checkpoint.engine import live_engine

    return save_checkpoint(
        folder,
        name,
        live_engine(engine),
        config={"model_type": "tiny"},
        state={"global_step": step},
        rng=capture_rng(),
        ranks=GroupRanks(),
        log=print,
    )


def restore(engine: Any, path: Path) -> None:
    from moe_lvlm.checkpoint.engine import live_engine

    restore_training_state(live_engine(engine), Checkpoint(path))


def resume_every_case(folder: Path) -> None:
    """Train 2 + 2 steps; a fresh engine restored after 2 must give the same losses and then the same state."""
    for case in CASES:
        unbroken = make_engine(case, seed=1)
        train(unbroken, 0, 2)
        save(folder, case.name, unbroken, 2)
        check_against_deepspeed(unbroken, folder / case.name, case)
        losses = train(unbroken, 2, 2)
        save(folder, f"{case.name}-unbroken", unbroken, 4)
        unbroken.destroy()

        resumed = make_engine(case, seed=2)
        restore(resumed, folder / case.name)
        assert resumed.global_steps == 2
        assert train(resumed, 2, 2) == losses, case
        save(folder, f"{case.name}-resumed", resumed, 4)
        resumed.destroy()
        if dist.get_rank() == 0:
            assert_equal(assemble(folder / f"{case.name}-unbroken"), assemble(folder / f"{case.name}-resumed"))
        dist.barrier()


def check_against_deepspeed(engine: Any, path: Path, case: Case) -> None:
    """What we stored is what DeepSpeed's own functions assemble."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if case.round_robin:  # its offsets are wrong there
        return
    stored = assemble(path)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        rows = getattr(parameter, "expert_slice", None)
        share = slice(None) if rows is None else slice(rows.start, rows.stop)
        master = parameter if case.stage == 0 else safe_get_full_fp32_param(parameter)
        assert torch.equal(stored[name, "master"][share], master), (case, name)
        if case.stage == 3:  # at ZeRO 1 and 2 it knows the first group's moments only
            moment = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
            assert torch.equal(stored[name, "exp_avg_sq"][share], moment), (case, name)


def exchange(folder: Path) -> None:
    """Restore every checkpoint of the list in engines of other kinds, and save again without training."""
    if dist.get_world_size() == 1:
        refuse(folder)
    for source, case in exchanges(dist.get_world_size()):
        engine = make_engine(case, seed=3)
        restore(engine, folder / source)
        name = f"{source}-to-world{dist.get_world_size()}-{case.name}"
        save(folder, name, engine, 2)
        engine.destroy()
        if dist.get_rank() == 0:
            assert_equal(assemble(folder / source), assemble(folder / name))
        dist.barrier()


def refuse(folder: Path) -> None:
    """What could not be restored exactly is not saved."""
    from moe_lvlm.checkpoint.engine import check_version, live_engine

    with pytest.raises(ValueError, match=r"deepspeed is 0\.19\.9"):
        check_version("0.19.9")
    engine = make_engine(Case(0, "bf16"), seed=1)
    with pytest.raises(ValueError, match=r"DeepSpeed optimizer FP16_\w*Optimizer keeps its masters"):
        live_engine(engine)
    engine.destroy()
    engine = make_engine(Case(2), seed=1)
    engine.backward(engine(batch(0, 0)))
    engine.step()
    with pytest.raises(SaveError, match="micro-step 1 is inside of an accumulation over 2"):
        save(folder, "refused", engine, 1)
    assert not (folder / "refused").exists()
    engine.destroy()


def exchanges(world_size: int) -> list[tuple[str, Case]]:
    if world_size == 1:
        return [
            ("zero2-fp32-ep2", Case(1)),
            ("zero3-fp32-ep2", Case(0)),
            ("zero1-fp32-ep1", Case(3)),
            ("zero3-bf16-ep2", Case(2, "bf16")),
        ]
    return [
        ("zero2-fp32-ep2-to-world1-zero1-fp32-ep1", Case(3, "fp32", 2)),
        ("zero1-fp32-ep1-to-world1-zero3-fp32-ep1", Case(2, "fp32", 2)),
        ("zero3-bf16-ep2-to-world1-zero2-bf16-ep1", Case(1, "bf16", 2)),
        ("zero1-bf16-ep2", Case(3, "bf16", 1)),
        ("zero0-fp32-ep1", Case(1, "fp32", 2)),
    ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "checkpoints"
    spawn(2, resume_every_case, folder)
    return folder


def test_resumed_runs_equal_unbroken_ones(checkpoints: Path) -> None:
    for case in CASES:
        assert verify(checkpoints / case.name, is_finite_checked=True) == []
        stored = assemble(checkpoints / case.name)
        assert stored["sparse.0.experts.w1", "exp_avg"].shape == (EXPERTS, 7, 8)
        assert ("sparse.1.experts.w1", "master") not in stored
        assert stored["sparse.1.experts.w1", "weight"].dtype == getattr(
            torch, {"fp32": "float32", "bf16": "bfloat16"}[case.precision]
        )
        assert ("scratch", "weight") not in stored
        assert stored["counted", "weight"].dtype == torch.int64


def test_moments_are_not_trivially_equal(checkpoints: Path) -> None:
    before, after = assemble(checkpoints / "zero2-fp32-ep2"), assemble(checkpoints / "zero2-fp32-ep2-resumed")
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == (key[1] == "weight"), key


def test_expert_parallelism_does_not_change_what_is_stored(checkpoints: Path) -> None:
    one, two = assemble(checkpoints / "zero2-fp32-ep1"), assemble(checkpoints / "zero2-fp32-ep2")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


def test_other_topologies_restore_the_same_bits(checkpoints: Path) -> None:
    spawn(1, exchange, checkpoints)
    spawn(2, exchange, checkpoints)


def test_a_plain_model_restores_what_two_processes_saved(checkpoints: Path, tmp_path: Path) -> None:
    source = checkpoints / "zero3-fp32-ep2"
    model = Tiny(seed=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = live_model(model, torch.optim.AdamW(trained, lr=1.0))
    restore_training_state(training, Checkpoint(source))
    rates = training.learning_rates()
    save_checkpoint(
        tmp_path, "plain", training, config={}, state={"global_step": 2}, rng={}, ranks=SingleRank(), log=print
    )  # fmt: skip
    assert set(rates.values()) == {3e-3} or set(rates.values()) == {1e-2}
    assert_equal(assemble(source), assemble(tmp_path / "plain"))


def test_weights_are_read_by_rows_of_experts(checkpoints: Path) -> None:
    stored = assemble(checkpoints / "zero3-bf16-ep2")
    source = open_source(checkpoints / "zero3-bf16-ep2")
    names = set(source.names())
    assert names == {name for name, kind in stored if kind in ("master", "weight")}
    for name in names:
        kind = "master" if (name, "master") in stored else "weight"
        assert source.shape(name) == stored[name, kind].shape
        assert source.dtype(name) == stored[name, kind].dtype
        assert torch.equal(source.read(name), stored[name, kind])
    assert torch.equal(source.read("sparse.0.experts.w2", 1, 3), stored["sparse.0.experts.w2", "master"][1:3])
