"""moe_lvlm/slurm/environment.sh: what is set, and what of the caller's stays."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.launch.launches import ROOT


def sourced(python: str | Path, **before: str) -> dict[str, str]:
    """The environment after the file, from one that holds nothing else."""
    script = f"set -euo pipefail; . {ROOT}/moe_lvlm/slurm/environment.sh; env -0"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), **before}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    after = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {key: value for key, value in after.items() if key not in ("PYTHON", "PWD", "SHLVL", "_")}


def make_environment(folder: Path) -> Path:
    """A virtual environment, as far as it can be seen."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    return folder / "bin" / "python"


def test_what_is_set(tmp_path: Path) -> None:
    assert sourced(make_environment(tmp_path / "venv")) == {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_DEBUG": "WARN",
        "TORCH_EXTENSIONS_DIR": f"{tmp_path}/venv/torch_extensions",
        "PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin",
    }


def test_what_is_set_already_stays(tmp_path: Path) -> None:
    before = {
        "OMP_NUM_THREADS": "16",
        "OMP_WAIT_POLICY": "ACTIVE",
        "TOKENIZERS_PARALLELISM": "true",
        "NCCL_DEBUG": "INFO",
        "TORCH_EXTENSIONS_DIR": "/scratch/extensions",
    }
    after = sourced(make_environment(tmp_path / "venv"), **before)
    assert {key: after[key] for key in before} == before


def test_an_interpreter_of_the_system_or_of_a_container() -> None:
    """There is no folder of its own for compiled extensions: torch decides."""
    for python in ("python3", "/usr/bin/python3", "/in/the/container/bin/python"):
        after = sourced(python)
        assert "TORCH_EXTENSIONS_DIR" not in after and after["PATH"] == "/usr/bin:/bin"
