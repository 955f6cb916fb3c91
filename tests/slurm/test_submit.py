"""What `moe-lvlm submit` plans and writes, on machines with and without SLURM."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lvlm.cli import main
from moe_lvlm.config.load import load_recipe
from moe_lvlm.slurm.files import missing_files
from moe_lvlm.slurm.plan import Wish, plan_jobs
from moe_lvlm.slurm.script import runs_of
from moe_lvlm.slurm.settings import JobSettings
from moe_lvlm.slurm.site import JobError
from moe_lvlm.slurm.submit import submit
from tests.tiny_run import write_run_inputs

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = JobSettings(gpus_per_node=0, nodes=2)
DOCS = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
PAPERS = re.findall(
    r"^moe-lvlm (submit .*)$", DOCS.partition("## The papers on 8 x A800")[2].partition("## ")[0], re.MULTILINE
)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine where there is none: only the shell's own commands are there."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MOE_LVLM_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_run_inputs(tmp_path))


def wish(recipe: str, directory: Path, *overrides: str, **more: object) -> Wish:
    return Wish(recipe=recipe, overrides=overrides, directory=directory, command="moe-lvlm submit", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", PAPERS, ids=lambda line: line.removeprefix("submit ").replace("/", "."))
def test_the_lines_of_the_papers_give_scripts(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)
    assert main([*words, "--site", str(ROOT / "launch/slurm/a800.yaml"), "--dry-run"]) == 0
    scripts = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=8\n" in scripts
    assert scripts.count("#!/bin/bash") == (3 if "--chain" in words else 1)
    assert not (tmp_path / "runs").exists()


def test_all_papers_are_there() -> None:
    assert {word.split("/")[0] for line in PAPERS for word in line.split() if "/" in word} >= {"ltdr", "qmoe", "mocle"}


def test_without_slurm_the_script_is_written_and_named(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", recipe, "--gpus-per-node", "0"]) == 2
    script = tmp_path / "run" / "slurm" / "job.sbatch"
    assert str(script) in capsys.readouterr().err
    assert os.access(script, os.X_OK)
    resolved = load_recipe(str(script.with_name("recipe.yaml")))
    assert resolved == load_recipe(recipe)


def test_files_that_are_missing(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").unlink()
    with pytest.raises(JobError, match=r"data\.mixture\.0\.path: .*train\.json: no such file"):
        submit(wish(recipe, tmp_path), SETTINGS)
    assert not (tmp_path / "run").exists()
    with pytest.raises(JobError, match="no sbatch on this machine"):  # the next obstacle
        submit(wish(recipe, tmp_path), SETTINGS, allows_missing=True)


def test_what_the_package_ships_is_never_missing(tmp_path: Path) -> None:
    assert missing_files(load_recipe("quickstart"), tmp_path) == []


def test_a_chain_has_a_job_for_each_stage(recipe: str, tmp_path: Path) -> None:
    jobs = plan_jobs(wish(recipe, tmp_path, chain=True), SETTINGS)
    assert [job.script.name for job in jobs] == ["job-1-tune.sbatch", "job-2-sparse.sbatch"]
    assert [job.stage for job in jobs] == ["tune", None]
    assert "--until tune" in jobs[0].text
    assert "--until" not in jobs[1].text
    assert all(runs_of(job.text) == [tmp_path / "run"] for job in jobs)


def test_a_sweeps_runs(recipe: str, tmp_path: Path) -> None:
    [job] = plan_jobs(wish(recipe, tmp_path, sweep=("seed=0,1", "moe.top_k=1,2"), max_parallel=3), SETTINGS)
    assert "#SBATCH --array=0-3%3\n" in job.text
    folders = [tmp_path / "run-sweep" / f"seed={seed},moe.top_k={k}" for seed in (0, 1) for k in (1, 2)]
    assert runs_of(job.text) == list(job.runs) == folders
    assert [(one.seed, one.moe.top_k, one.output_dir) for one in job.runs.values()] == [
        (seed, k, str(folder)) for (seed, k), folder in zip([(0, 1), (0, 2), (1, 1), (1, 2)], folders, strict=True)
    ]


def test_bash_picks_the_run_of_each_task(recipe: str, tmp_path: Path) -> None:
    [job] = plan_jobs(wish(recipe, tmp_path, sweep=("seed=0,1",)), SETTINGS)
    head = job.text.partition("STATE=")[0] + 'printf %s "$RUN"'
    done = subprocess.run(
        ["/bin/bash", "-c", head], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == str(tmp_path / "run-sweep" / "seed=1")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sweep": ("seed=0,1",), "chain": True}, "--sweep beside --chain"),
        ({"until": "tune", "chain": True}, "--chain beside --until"),
        ({"max_parallel": 2}, "--max-parallel without --sweep"),
        ({"until": "tuned"}, "did you mean 'tune'"),
    ],
)
def test_wishes_that_do_not_go_together(recipe: str, tmp_path: Path, more: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_jobs(wish(recipe, tmp_path, **more), SETTINGS)


def test_a_run_that_is_done_or_another(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(Path(recipe).read_text().replace("name: tiny", "name: tiny\nseed: 7"))
    with pytest.raises(JobError, match="another recipe \\(seed: 7 before, 0 now\\)"):
        plan_jobs(wish(recipe, tmp_path), SETTINGS)
    (run / "recipe.yaml").unlink()
    (run / "DONE.tune").touch()
    plan_jobs(wish(recipe, tmp_path), SETTINGS)
    with pytest.raises(JobError, match=r"trained already \(DONE\.tune"):
        plan_jobs(wish(recipe, tmp_path, until="tune"), SETTINGS)
    (run / "DONE").touch()
    with pytest.raises(JobError, match=r"trained already \(DONE"):
        plan_jobs(wish(recipe, tmp_path), SETTINGS)


def test_nodes_that_were_bad_before_are_not_asked_for(recipe: str, tmp_path: Path) -> None:
    state = tmp_path / "run" / "slurm"
    state.mkdir(parents=True)
    (state / "excluded").write_text("n7\nn9\n")
    [job] = plan_jobs(wish(recipe, tmp_path), SETTINGS.model_copy(update={"exclude": "n1"}))
    assert "#SBATCH --exclude=n1,n7,n9\n" in job.text
    assert "EXCLUDED=n1,n7,n9 " in job.text


def test_a_process_has_a_core_for_each_data_worker(recipe: str, tmp_path: Path) -> None:
    [job] = plan_jobs(wish(recipe, tmp_path, "data.num_workers=4"), SETTINGS)
    assert "#SBATCH --cpus-per-task=5\n" in job.text


def test_a_script_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "mine.sbatch"
    assert main(["submit", str(script)]) == 2
    assert "no such file" in capsys.readouterr().err
    script.write_text("#!/bin/bash\n#SBATCH --nodes=1\necho hello\n#SBATCH --mem=0\n")
    assert main(["submit", str(script)]) == 2
    assert "line 4" in capsys.readouterr().err
    assert main(["submit", str(script), "--nodes", "2"]) == 2
    assert "edit it" in capsys.readouterr().err
    with pytest.raises(JobError, match="no job of ours"):
        runs_of("#!/bin/bash\necho hello\n")


def test_help_needs_no_torch() -> None:
    code = "import sys, moe_lvlm.cli as c\ntry: c.main(['submit', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
