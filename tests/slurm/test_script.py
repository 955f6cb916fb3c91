"""The script: what it asks for, what it runs, and the lint that finds what SLURM passes over."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.slurm.plan import Wish, plan_jobs
from moe_lvlm.slurm.script import misplaced_directives
from moe_lvlm.slurm.settings import JobSettings
from moe_lvlm.slurm.site import JobError

CPU = {"gpus_per_node": 0, "nodes": 2}


def script(directory: Path, *overrides: str, wish: dict[str, Any] | None = None, **settings: Any) -> str:
    asked = Wish(
        recipe="quickstart", overrides=overrides, directory=directory, command="moe-lvlm submit", **(wish or {})
    )
    return plan_jobs(asked, JobSettings(**settings))[0].text


def options(text: str) -> dict[str, str | None]:
    """The directives, as sbatch reads them: up to the first line that is no comment, quotes taken away."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH ")):
                name, equals, value = word.removeprefix("--").partition("=")
                found[name] = value if equals else None
    return found


def test_what_is_asked_of_slurm(tmp_path: Path) -> None:
    text = script(
        tmp_path, "data.num_workers=3", nodes=1, gpus_per_node=2, gpu_type="a800", time="2-00:00:00", partition="gpu",
        account="vision", qos="high", constraint="ib&nvlink", memory="0", exclude="n7", exclusive=True,
        sbatch=["--mail-type=FAIL"], stop_signal="USR2", stop_before=600,
    )  # fmt: skip
    run = tmp_path / "runs/quickstart"
    assert options(text) == {
        "job-name": "quickstart", "nodes": "1", "ntasks-per-node": "2", "gpus-per-node": "a800:2", "cpus-per-task": "4",
        "mem": "0", "time": "2-00:00:00", "partition": "gpu", "account": "vision", "qos": "high",
        "constraint": "ib&nvlink", "exclude": "n7", "signal": "B:USR2@600", "output": f"{run}/slurm/job-%j.log",
        "chdir": str(tmp_path), "open-mode": "append", "exclusive": None, "requeue": None, "mail-type": "FAIL",
    }  # fmt: skip
    assert 'trap "" USR2' in text
    assert "--stop-signal USR2" in text


def test_cpu_jobs_ask_for_no_gpu(tmp_path: Path) -> None:
    text = script(tmp_path, gpus_per_node=0, processes_per_node=2)
    assert "gpus-per-node" not in options(text)
    assert "export DS_ACCELERATOR=cpu" in text


def test_the_environment_is_the_one_that_submits(tmp_path: Path) -> None:
    text = script(tmp_path, env={"NCCL_IB_HCA": "mlx5; rm x"}, setup=["module load cuda"], **CPU)
    assert f"PYTHON={shlex.quote(sys.executable)}" in text
    assert "export NCCL_IB_HCA='mlx5; rm x'" in text
    assert "\nmodule load cuda\n" in text


def test_a_folder_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    text = script(folder, **CPU)
    assert options(text)["chdir"] == str(folder)
    assert options(text)["output"] == f"{folder}/runs/quickstart/slurm/job-%j.log"
    assert f"RUN='{folder}/runs/quickstart'" in text


@pytest.mark.parametrize("mark", ["%", '"', "'", "$", "`", "\\"])
def test_a_folder_that_slurm_would_misread(tmp_path: Path, mark: str) -> None:
    folder = tmp_path / f"my{mark}runs"
    folder.mkdir()
    with pytest.raises(JobError, match="in a path of the job"):
        script(folder, **CPU)


def test_pyxis(tmp_path: Path) -> None:
    container = {"image": "/images/moe#lvlm:25.09.sqsh", "mounts": ["/data:/data:ro"]}
    text = script(tmp_path, f"output_dir={tmp_path.parent}/elsewhere", container=container, gpus_per_node=2)
    mounts = f"/data:/data:ro,{tmp_path}:{tmp_path},{tmp_path.parent}/elsewhere:{tmp_path.parent}/elsewhere"
    assert f"--container-mounts={mounts}" in text
    assert "'--container-image=/images/moe#lvlm:25.09.sqsh'" in text
    assert "INSIDE=()" in text
    assert "PYTHON=python3" in text
    assert f"export PATH={sys.prefix}" not in text  # the image has an environment of its own


def test_apptainer(tmp_path: Path) -> None:
    text = script(tmp_path, container={"image": "/images/moe.sif", "runtime": "apptainer"}, gpus_per_node=2)
    block = text.partition("INSIDE=(")[2].partition(")")[0]
    assert shlex.split(block) == [
        "apptainer", "exec", "--nv", "--bind", f"{tmp_path}:{tmp_path}", "--pwd", str(tmp_path), "/images/moe.sif",
    ]  # fmt: skip
    assert "IN_STEP=()" in text


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no preflight": {"preflight": {"enabled": False}},
    "everything": {
        "preflight": {"min_gpu_memory": 70, "min_memory": 500, "min_bandwidth": 10, "command": "check 'a b' && x"},
        "container": {"image": "x.sif", "runtime": "apptainer"},
        "env": {"A": "b c"},
        "setup": ["true"],
        "gpus_per_node": 2,
    },
    "sweep": {"wish": {"sweep": ("seed=0,1",), "max_parallel": 1}},
    "until": {"wish": {"until": "tune"}},
}


@pytest.mark.parametrize("case", CASES)
def test_shellcheck_and_bash_find_nothing(tmp_path: Path, case: str) -> None:
    text = script(tmp_path, **({} if "gpus_per_node" in CASES[case] else CPU), **CASES[case])
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "--shell=bash", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert misplaced_directives(text) == []


def test_the_lint() -> None:
    text = "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --nodes=2",
            "# SBATCH --time=5",
            "",
            " #SBATCH --mem=0",
            "##SBATCH --qos=high",
            "echo begins # SBATCH here",
            "#SBATCH --account=vision",
        ]
    )
    assert misplaced_directives(text) == [
        "line 3: '# SBATCH --time=5': SLURM reads only lines that begin with #SBATCH",
        "line 5: ' #SBATCH --mem=0': SLURM reads only lines that begin with #SBATCH",
        "line 8: '#SBATCH --account=vision' stands after the first command (line 7): SLURM passes over it",
    ]
    assert misplaced_directives("#SBATCH --nodes=1\n")[0].startswith(
        "line 1: '#SBATCH --nodes=1'; allowed: an interpreter"
    )
    assert "carriage return" in misplaced_directives("#!/bin/bash\n#SBATCH --nodes=1\r\n")[0]
