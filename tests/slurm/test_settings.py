"""What a job asks for: SLURM's times, values that belong in no script, a site's defaults below what is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.slurm.settings import JobSettings, seconds_of
from moe_lvlm.slurm.site import JobError, default_site, job_settings, read_site

# From the manual of sbatch, --time.
TIMES = {
    "90": 90 * 60,
    "90:30": 90 * 60 + 30,
    "12:00:00": 12 * 3600,
    "2-0": 2 * 86400,
    "1-12": 86400 + 12 * 3600,
    "1-12:30": 86400 + 12 * 3600 + 30 * 60,
    "1-02:03:04": 86400 + 2 * 3600 + 3 * 60 + 4,
}


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times_are_slurms(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2h", "1:2:3:4", "-5", "1-", "two days", "1-12:30:00:00"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: 90 \\(minutes\\)"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (1, 8, 8)),
        ({"nodes": 4, "gpus_per_node": 4}, (4, 4, 16)),
        ({"gpus_per_node": 0}, (1, 1, 1)),
        ({"nodes": 2, "gpus_per_node": 0, "processes_per_node": 3}, (2, 3, 6)),
    ],
)
def test_processes(asked: dict[str, Any], expected: tuple[int, int, int]) -> None:
    settings = JobSettings(**asked)
    assert (settings.nodes, settings.num_processes_per_node, settings.world_size) == expected


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"nodes": 0}, ["nodes", "0"]),
        ({"partition": "a b"}, ["partition", "'a b'"]),
        ({"account": "x; rm -rf ~"}, ["account"]),
        ({"partition": "$(date)"}, ["partition"]),
        ({"job_name": "my run"}, ["job_name", "'my run'"]),
        ({"memory": "lots"}, ["memory", "'lots'"]),
        ({"time": "soon"}, ["time", "'soon'", "2-00:00:00"]),
        ({"time": "5", "stop_before": 300}, ["stop_before", "300", "5"]),
        ({"stop_signal": "KILL"}, ["stop_signal", "'KILL'"]),
        ({"sbatch": ["-N 2"]}, ["sbatch", "'-N 2'", "long option"]),
        ({"sbatch": ["--nodes=2"]}, ["--nodes", "set by the job itself"]),
        ({"sbatch": ["--comment=a\n#SBATCH --nodes=9"]}, ["sbatch"]),
        ({"setup": ["module load x\nrm y"]}, ["setup"]),
        ({"env": {"A B": "1"}}, ["env", "'A B'"]),
        ({"processes_per_node": 2}, ["processes_per_node", "2", "gpus_per_node: 8"]),
        ({"container": {"image": "x", "mounts": ["data"]}}, ["mounts", "'data'"]),
        ({"container": {"image": "x", "runtime": "docker"}}, ["runtime", "'docker'"]),
        ({"nodez": 2}, ["nodez", "did you mean 'nodes'"]),
        ({"preflight": {"min_disc": 2}}, ["preflight.min_disc", "did you mean 'min_disk'"]),
    ],
)
def test_mistakes_name_the_key_and_the_value(asked: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        job_settings(None, asked)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_asked_lies_over_the_site(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: a800\naccount: vision\ntime: 2-00:00:00\nenv: {NCCL_IB_HCA: mlx5}\n"
        "container: {runtime: apptainer, mounts: [/data]}\npreflight: {min_disk: 100, min_gpu_memory: 70}\n"
    )
    settings = job_settings(
        site, {"account": "other", "container": {"image": "x.sif"}, "preflight": {"enabled": False}}
    )
    assert (settings.partition, settings.account, settings.time) == ("a800", "other", "2-00:00:00")
    assert settings.container.model_dump() == {
        "image": "x.sif", "runtime": "apptainer", "mounts": ("/data",), "python": "python3",
    }  # fmt: skip
    assert (settings.preflight.enabled, settings.preflight.min_disk) == (False, 100)
    assert settings.env == {"NCCL_IB_HCA": "mlx5"}


def test_a_mistake_of_the_sites_names_its_file(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partiton: a800\n")
    with pytest.raises(JobError, match=r"site\.yaml: partiton: unknown key, did you mean 'partition'\?"):
        job_settings(site, {})


@pytest.mark.parametrize(
    ("text", "words"), [("- a", "allowed: a mapping"), ("a: [", "not YAML"), ("a: 1\na: 2", "stands twice")]
)
def test_no_site(tmp_path: Path, text: str, words: str) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(JobError, match=words):
        read_site(site)


def test_where_the_sites_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_LVLM_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_site() is None
    path = tmp_path / "moe_lvlm" / "slurm.yaml"
    path.parent.mkdir()
    path.write_text("nodes: 2\n")
    assert default_site() == path
    named = tmp_path / "site.yaml"
    monkeypatch.setenv("MOE_LVLM_SITE", str(named))
    with pytest.raises(JobError, match="MOE_LVLM_SITE"):
        default_site()
    named.write_text("")
    assert default_site() == named
    assert read_site(named) == {}
