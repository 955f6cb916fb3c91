"""tools/reshard.py: a run's checkpoint written anew from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_lvlm.checkpoint.base import Base, BaseTensor, record_folder
from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.original import open_original
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.reshard import plan_reshard
from moe_lvlm.checkpoint.rewrite import write_checkpoint
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.checkpoint.source import open_source, source_files
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.check import check
from moe_lvlm.training.lock import lock_folder
from tests.tiny_models import tiny_moe_llava
from tests.tools.conftest import TOOLS, Import

NAME = "sparse-000004"
STATE = {
    "stage": 1, "step": 4, "global_step": 4, "samples": 8, "bad": 0, "tokens": 100, "is_stage_done": False,
    "world_size": 1, "expert_parallel_size": 1, "zero_stage": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("reshard")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint of a model whose routers are trained."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." in name)
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    save_checkpoint(
        folder / "checkpoints",
        NAME,
        live_model(model, optimizer),
        config=json.loads(model.config.to_json_string()),
        state=STATE,
        rng=capture_rng(),
        ranks=SingleRank(),
        log=print,
    )
    return folder


def test_a_run_is_merged(tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "checkpoints" / NAME
    assert tool.main([str(run), str(target), "--files", "1", "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert tool.main([str(run), str(target), "--files", "1"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {target}: " in out and "note" not in out
    assert "  kept     exp_avg_sq      2 tensors                1,024 bytes" in out  # 2 gates of [4, 32] floats
    assert check(target).problems == ()
    assert (target.parent / "latest").read_text() == f"{NAME}\n"


def test_without_optimizer_and_by_name(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run / "checkpoints" / NAME
    arguments = [str(source), str(tmp_path), "--name", "small", "--drop-optimizer", "--dtype", "bfloat16"]
    assert tool.main(arguments) == 0
    out = capsys.readouterr().out
    assert "dropped  exp_avg " in out and "a new run or stage can start from the result" in out
    path = tmp_path / "small"
    assert check(path).problems == ()
    dtypes = {entry.dtype for kinds in Checkpoint(path).index.tensors.values() for entry in kinds.values()}
    assert dtypes == {torch.bfloat16}
    assert tool.main(arguments) == 2
    assert "small: exists already" in capsys.readouterr().err
    assert tool.main([*arguments, "--overwrite"]) == 0


def test_small_files_and_another_name(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(run), str(tmp_path / "c" / "parts"), "--max-file-size", "100kB"]) == 0
    assert len(list((tmp_path / "c" / "parts").glob("rank-*"))) > 2
    assert (
        f"note: training knows a checkpoint's stage by its name: it goes on from this one if it is called {NAME}"
        in (capsys.readouterr().out)
    )


def test_what_is_left_out(tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stays left out, or is taken in: here a whole checkpoint is the base of one that holds what is trained."""
    source = Checkpoint(run / "checkpoints" / NAME)
    frozen = {name: kinds["weight"] for name, kinds in source.index.tensors.items() if "weight" in kinds}
    base = Base(
        (record_folder(source.path, source_files(source.path, frozen), name="first"),),
        {name: BaseTensor(0, name, entry.dtype, entry.shape) for name, entry in frozen.items()},
    )
    write_checkpoint(
        tmp_path / "small",
        NAME,
        {name: kinds for name, kinds in open_original(source.path).tensors.items() if name not in frozen},
        config=source.config,
        state={key: value for key, value in source.state.items() if key != "format_version"},
        base=base,
    )
    small, kept, whole = (tmp_path / name / NAME for name in ("small", "kept", "whole"))
    assert tool.main([str(small), str(kept)]) == 0
    assert f"  left out weight     {len(frozen):>6} tensors {base.num_bytes:>20,} bytes" in capsys.readouterr().out
    assert tool.main([str(small), str(whole), "--whole"]) == 0
    assert "left out" not in capsys.readouterr().out
    for path, is_whole in ((kept, False), (whole, True)):
        assert check(path).problems == ()
        assert (Checkpoint(path).base is None) == is_whole
        for name in source.index.tensors:
            assert torch.equal(open_source(path).read(name), open_source(source.path).read(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nothing", "{out}/x"], "no such folder; allowed: a checkpoint of ours or of DeepSpeed"),
        (["{run}", "{out}/.hidden"], "checkpoint name '.hidden'"),
        (["{run}", "{out}/x", "--files", "0"], "number of files: 0; allowed: 1 and above"),
        (["{run}", "{out}/x", "--stage", "tune"], "stage: 'tune', but no recipe"),
        (["{run}", "{out}/x", "--tag", "t"], "tag is for DeepSpeed's alone"),
        (["{run}", "{out}/x", "--recipe", "quickstar"], "unknown recipe 'quickstar', did you mean 'quickstart'"),
    ],
)
def test_mistakes(
    tool: ModuleType,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [argument.format(run=run, out=tmp_path / "out") for argument in arguments]
    assert tool.main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nobody_may_train_there(tool: ModuleType, run: Path, tmp_path: Path) -> None:
    """The lock of another process, which a run holds while it trains."""
    target = tmp_path / "busy"
    target.mkdir()
    (target / "recipe.yaml").write_text("")
    holder = (
        "import sys; from pathlib import Path; from moe_lvlm.training.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TOOLS.parent
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert tool.main([str(run), str(target / "checkpoints" / NAME)]) == 2
        assert not (target / "checkpoints").exists()
        process.communicate(b"")
    assert tool.main([str(run), str(target / "checkpoints" / NAME)]) == 0
    with lock_folder(target):
        pass


def test_help_says_what_resharding_is(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "Resharding only changes which file holds what" in out
    assert "python tools/reshard.py runs/a " in out


def test_an_import_must_be_of_the_model_that_config_describes(tool: ModuleType, run: Path, tmp_path: Path) -> None:
    plan = plan_reshard(open_original(run))
    tool._check_model(run / "checkpoints" / NAME, plan)
    config = json.loads((run / "checkpoints" / NAME / "config.json").read_text())
    config["moe"]["num_experts"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not of the model in .*: .* 4 experts, config\.json says num_experts 8"):
        tool._check_model(tmp_path / "config.json", plan)
