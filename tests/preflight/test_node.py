"""The check of one machine: as a user runs it, and each finding by itself. nvidia-smi is a double on PATH."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_lvlm.preflight import node, programs
from moe_lvlm.preflight.finding import Finding, node_lines, one_line
from moe_lvlm.preflight.gpus import check_gpus
from moe_lvlm.preflight.node import NodeDemands, check_node
from moe_lvlm.preflight.place import LauncherError, Place, read_place
from tests.preflight.ranks import COMMAND, ROOT

# As driver 550 prints two A800 that nobody uses: --format=csv,noheader,nounits.
ONE, TWO = "GPU-11111111-aaaa-bbbb-cccc-000000000001", "GPU-22222222-aaaa-bbbb-cccc-000000000002"
NAME = "NVIDIA A800-SXM4-80GB"
IDLE = f"0, {ONE}, {NAME}, P0, 81920, 4, 81037\n1, {TWO}, {NAME}, P0, 81920, 4, 81037\n"
SOUND = f"{ONE}, 0\n{TWO}, 0\n"
NO_REMAPS = f"{ONE}, No\n{TWO}, No\n"


class SMI:
    """The double: what it prints for a query, and its exit status."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "nvidia-smi"
        script.write_text(
            f"""#!/bin/bash
for argument; do case $argument in --query-*) query=${{argument#--query-}};; esac; done
file="{folder}/${{query//[^a-z]/-}}"
if [ ! -e "$file" ]; then echo "Field \\"${{query#*,}}\\" is not a valid field to query."; exit 2; fi
cat "$file"
exit "$(cat "$file.status" 2>/dev/null || echo 0)"
""",
            encoding="utf-8",
        )
        script.chmod(0o755)
        self.answer("gpu=index,uuid,name,pstate,memory.total,memory.used,memory.free", IDLE)
        self.answer("gpu=uuid,ecc.errors.uncorrected.volatile.total", SOUND)
        self.answer("compute-apps=gpu_uuid,pid,process_name", "")
        self.answer("remapped-rows=gpu_uuid,remapped_rows.pending", NO_REMAPS)
        self.answer("remapped-rows=gpu_uuid,remapped_rows.failure", NO_REMAPS)

    def answer(self, query: str, text: str, *, status: int = 0) -> None:
        """What to print for a query from now on."""
        file = self._folder / re.sub("[^a-z]", "-", query)
        file.write_text(text, encoding="utf-8")
        file.with_name(f"{file.name}.status").write_text(str(status), encoding="utf-8")

    def gpus(self, text: str, *, status: int = 0) -> None:
        """The answer to the main query."""
        self.answer("gpu=index,uuid,name,pstate,memory.total,memory.used,memory.free", text, status=status)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SMI:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return SMI(folder)


def problems(findings: list[Finding]) -> list[str]:
    return [finding.problem for finding in findings if finding.problem is not None]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_gpus_that_are_well(smi: SMI) -> None:
    findings = check_gpus(count=2, min_gpu_memory=70)
    assert problems(findings) == []
    assert findings[0].facts == {"gpus": "2", "gpu": NAME}
    assert [finding.value for finding in findings] == [
        f"2 ({NAME})",
        "79.1 of 80.0 GiB free",  # 81037 and 81920 MiB by 1024
        "79.1 of 80.0 GiB free",
        "ECC and row remaps: no errors",
    ]


def test_too_few_gpus(smi: SMI) -> None:
    assert problems(check_gpus(count=8, min_gpu_memory=None)) == ["2 GPU(s), asked for 8"]


def test_gpus_that_do_not_matter(smi: SMI) -> None:
    smi.gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", status=9)
    assert check_gpus(count=0, min_gpu_memory=None) == []
    assert problems(check_gpus(count=None, min_gpu_memory=None)) == []


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("No devices were found\n", 6),
        ("Unable to determine the device handle for GPU 0000:CB:00.0: Unknown Error\n", 15),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n\n",
            9,
        ),
    ],
)
def test_nvidia_smi_fails(smi: SMI, text: str, status: int) -> None:
    smi.gpus(text, status=status)
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == [
        f"nvidia-smi ended with status {status}: {text.strip()}"
    ]


def test_no_devices_with_status_0(smi: SMI) -> None:
    smi.gpus("No devices were found\n")
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == ["0 GPU(s), asked for 1"]


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == ["nvidia-smi is not on PATH"]


def test_nvidia_smi_hangs(smi: SMI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/bash\nsleep 600\n", encoding="utf-8")
    monkeypatch.setattr("moe_lvlm.preflight.gpus._LIMIT", 1.0)
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == ["nvidia-smi did not answer within 1 s"]


def test_a_gpu_in_use_by_somebody(smi: SMI) -> None:
    smi.answer("compute-apps=gpu_uuid,pid,process_name", f"{TWO}, 4711, /usr/bin/python3\n")
    assert problems(check_gpus(count=2, min_gpu_memory=None)) == ["GPU 1 is in use by process 4711 (/usr/bin/python3)"]


def test_the_multi_process_service_is_nobody(smi: SMI) -> None:
    smi.answer("compute-apps=gpu_uuid,pid,process_name", f"{TWO}, 12, /usr/bin/nvidia-cuda-mps-server\n")
    assert problems(check_gpus(count=2, min_gpu_memory=None)) == []


def test_a_gpu_in_use_by_a_process_that_we_cannot_see(smi: SMI) -> None:
    smi.gpus(f"0, {ONE}, {NAME}, P0, 81920, 61440, 19601\n")
    assert problems(check_gpus(count=1, min_gpu_memory=70)) == [
        "GPU 0 is in use: 60.0 GiB are taken and has 19.1 GiB free, asked for 70 GiB"
    ]


def test_a_small_gpu(smi: SMI) -> None:
    smi.gpus(f"0, {ONE}, NVIDIA A100-SXM4-40GB, P0, 40960, 4, 40337\n")
    assert problems(check_gpus(count=1, min_gpu_memory=70)) == ["GPU 0 has 39.4 GiB free, asked for 70 GiB"]


def test_a_gpu_that_needs_a_reset(smi: SMI) -> None:
    smi.gpus(f"0, {ONE}, {NAME}, [GPU requires reset], 81920, 4, 81037\n")
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == ["GPU 0 needs a reset"]


def test_memory_that_is_not_told(smi: SMI) -> None:
    smi.gpus(f"0, {ONE}, NVIDIA GB10, P8, [N/A], [N/A], [N/A]\n")
    findings = check_gpus(count=1, min_gpu_memory=None)
    assert problems(findings) == []
    assert findings[1].value == "nvidia-smi does not tell its memory"


@pytest.mark.parametrize(("yes", "no"), [("Yes", "No"), ("1", "0")])
def test_memory_errors(smi: SMI, yes: str, no: str) -> None:
    smi.answer("gpu=uuid,ecc.errors.uncorrected.volatile.total", f"{ONE}, 47\n{TWO}, [N/A]\n")
    smi.answer("remapped-rows=gpu_uuid,remapped_rows.pending", f"{ONE}, {no}\n{TWO}, {yes}\n")
    smi.answer("remapped-rows=gpu_uuid,remapped_rows.failure", f"{ONE}, {yes}\n{TWO}, {no}\n")
    assert problems(check_gpus(count=2, min_gpu_memory=None)) == [
        "GPU 0 had 47 uncorrected ECC error(s); GPU 0 could not replace bad memory rows; "
        "GPU 1 waits for a reset to replace bad memory rows"
    ]


def test_a_driver_that_tells_nothing_of_errors(smi: SMI, tmp_path: Path) -> None:
    for file in (tmp_path / "bin").iterdir():
        if file.name.startswith(("gpu-uuid", "remapped")):
            file.unlink()
    findings = check_gpus(count=2, min_gpu_memory=None)
    assert problems(findings) == []
    assert findings[-1].value == "nvidia-smi does not tell"


@pytest.mark.parametrize("chosen", ["1", TWO, "GPU-2222"])
def test_only_our_gpus_are_looked_at(smi: SMI, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    smi.answer("compute-apps=gpu_uuid,pid,process_name", f"{ONE}, 4711, python\n")
    findings = check_gpus(count=1, min_gpu_memory=None)
    assert problems(findings) == []
    assert [finding.name for finding in findings] == ["GPUs", "GPU 1", "GPU errors"]


@pytest.mark.parametrize("chosen", ["", "NoDevFiles", "7"])
def test_no_gpu_is_ours(smi: SMI, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert problems(check_gpus(count=1, min_gpu_memory=None)) == ["0 GPU(s), asked for 1"]


def check(**demands: object) -> list[str]:
    return problems(check_node(NodeDemands(gpus=0, **demands)))  # type: ignore[arg-type]


def test_disks(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert check(disks=[(tmp_path, 0.001)]) == []
    assert list(tmp_path.iterdir()) == [file]
    assert check(disks=[(tmp_path / "none", 1)]) == [f"{tmp_path}/none: No such file or directory"]
    assert check(disks=[(file, 0.001)]) == [f"{file}: Not a directory"]
    [problem] = check(disks=[(tmp_path, 1e9)])
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 2**30
    found = re.fullmatch(rf"{tmp_path}: ([0-9.]+) GiB free, asked for 1e\+09 GiB", problem)
    assert found is not None, problem
    assert float(found[1]) == pytest.approx(free, rel=0.05)


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:  # root may write anywhere, and these tests may run as root
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    [problem] = problems(node._check_disk(tmp_path, 0.001))
    assert problem == f"{tmp_path}: Read-only file system"


def test_memory() -> None:
    [problem] = check(min_memory=1e6)
    found = re.fullmatch(r"[0-9.]+ of ([0-9.]+) GiB of memory are available, asked for 1e\+06 GiB", problem)
    assert found is not None, problem
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert float(found[1]) == pytest.approx(total, rel=0.01)


def test_shared_memory() -> None:
    [problem] = check(min_shared_memory=1e6)
    assert problem.startswith("/dev/shm: ")


def test_the_sites_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(command="true") == []
    assert check(command="echo first; echo 'no InfiniBand  link' >&2; echo; exit 7") == ["no InfiniBand  link"]
    assert check(command="exit 7") == ["the site's command ended with status 7"]
    monkeypatch.setattr(node, "_COMMAND_LIMIT", 1.0)
    assert check(command="echo begun; sleep 600 & sleep 600") == ["the site's command did not end within 1 s"]


def test_what_a_killed_program_started_ends_too(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    answer = programs.run_program(["bash", "-c", f"sleep 600 & echo $! > {pid_file}; echo begun; wait"], limit=2.0)
    assert answer == programs.Answer(None, "begun\n")
    stat = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    limit = time.monotonic() + 60
    while _lives(stat):
        assert time.monotonic() < limit, "what the program started lives on"
        time.sleep(0.05)


def _lives(stat: Path) -> bool:
    """Whether a process does more than wait for its parent to collect it."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_check_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_CHECK_LIMIT", 1.0)
    assert check(command="sleep 5") == ["command: no answer within 1 s"]


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(node, "_check_memory", fail)
    with pytest.raises(RuntimeError, match="broken"):
        check()


def test_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    assert check(master="localhost") == []
    assert check(master=socket.gethostname()) == []
    [problem] = check(master="no-such-host.invalid")
    assert problem.startswith("no-such-host.invalid does not resolve: ")


@pytest.mark.parametrize(
    ("own", "master", "num_nodes", "is_good"),
    [
        ("10.0.0.2", "10.0.0.1", "2", True),
        ("127.0.1.1", "10.0.0.1", "2", True),  # Debian's own line for the host's name
        ("10.0.0.2", "127.0.0.1", "2", False),  # a hosts file that sends us to ourselves
        ("127.0.1.1", "127.0.1.1", "2", False),
        ("127.0.1.2", "127.0.0.1", "2", False),
        ("10.0.0.2", "127.0.1.1", "2", False),
        ("127.0.1.2", "127.0.1.1", "2", True),  # several nodes on one machine
        ("10.0.0.2", "127.0.0.1", "1", True),
        ("10.0.0.2", "127.0.0.1", None, False),
        ("10.0.0.2", "::1", "2", False),
    ],
)
def test_where_the_masters_name_leads(
    monkeypatch: pytest.MonkeyPatch, own: str, master: str, num_nodes: str | None, is_good: bool
) -> None:
    addresses = {"n1": master, "n2": own}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, _: [(0, 0, 0, "", (addresses[host], 0))])
    monkeypatch.setattr(socket, "gethostname", lambda: "n2")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    if num_nodes is not None:
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", num_nodes)
    expected = [] if is_good else [f"n1 resolves to {master}, which is this machine: see /etc/hosts"]
    assert check(master="n1") == expected
    assert check(master="n2") == []


def test_lines() -> None:
    good = Finding(name="GPUs", value="8", facts={"gpus": "8", "gpu": "NVIDIA A800"})
    bad = Finding(name="memory", value="", problem="too\nlittle\tof \x1b[31m it")
    assert node_lines("n1", [good, good]) == ["n1 ok gpus=8 gpu=NVIDIA_A800"]
    assert node_lines("n1", [bad, good, bad]) == ["n1 bad too little of [31m it"] * 2
    assert len(one_line("x" * 5000)) == 300


def test_as_a_user(smi: SMI, tmp_path: Path) -> None:
    result = run(
        "node", "--gpus", "2", "--min-gpu-memory", "70", "--disk", f"{tmp_path}:0.001", "--master", "localhost"
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "found", "asked", "for"]
    assert any(re.fullmatch(rf"torch +{re.escape(version('torch'))} +ok", line) for line in lines)
    assert lines[-1].endswith(": ok")
    smi.gpus(f"0, {ONE}, {NAME}, P0, 81920, 4, 81037\n")
    result = run("--gpus", "2", "--command", "exit 4")
    assert (result.returncode, result.stderr) == (1, "")
    assert "BAD: 1 GPU(s), asked for 2" in result.stdout
    assert "BAD: the site's command ended with status 4" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(": bad")


def test_as_a_jobs_script(smi: SMI) -> None:
    result = run("node", "--lines", "--gpus", "2", SLURMD_NODENAME="n7")
    assert (result.returncode, result.stderr) == (0, "")
    [line] = result.stdout.splitlines()
    name, verdict, *facts = line.split(" ")
    assert (name, verdict) == ("n7", "ok")
    found = dict(fact.split("=") for fact in facts)
    assert found["gpus"] == "2"
    assert found["gpu"] == NAME.replace(" ", "_")
    assert found["transformers"] == version("transformers")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    result = run("node", "--lines", "--gpus", "4", "--command", "printf 'a\\nno link'; exit 1", SLURMD_NODENAME="n7")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["n7 bad 2 GPU(s), asked for 4", "n7 bad no link"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["node", "--mib", "4"], "--mib"),
        (["fabric", "--gpus", "4"], "--gpus"),
        (["pairs", "--command", "true"], "--command"),
        (["node", "--disk", "/scratch"], "'/scratch'"),
        (["node", "--disk", "/scratch:none"], "'none'"),
        (["node", "--gpus", "-1"], "-1"),
        (["node", "--min-memory", "nan"], "'nan'"),
        (["fabric", "--nodes", "n[1-4]"], "n[1-4]"),
        (["fabric", "--nodes", "n1,n1"], "n1,n1"),
        (["nodes"], "'nodes'"),
    ],
)
def test_mistakes(options: list[str], said: str) -> None:
    result = run(*options)
    assert result.returncode == 2, result
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "not WORLD_SIZE, MASTER_PORT"),
        ({"RANK": "4"}, "RANK: '4'; allowed: a whole number, 0 to 3"),
        ({"RANK": "-1"}, "RANK: '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http'; allowed: a whole number, 1 to 65535"),
        ({"LOCAL_WORLD_SIZE": "1"}, "--nodes names 2 node\\(s\\), of 1 rank\\(s\\) each, but WORLD_SIZE is 4"),
        ({"LOCAL_WORLD_SIZE": None, "WORLD_SIZE": "5"}, "of 2 rank\\(s\\) each, but WORLD_SIZE is 5"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: '2'; allowed: a whole number, 0 to 1"),
    ],
)
def test_launchers_that_make_no_world(launcher: pytest.MonkeyPatch, changes: dict[str, str | None], said: str) -> None:
    for name, value in changes.items():
        if value is None:
            launcher.delenv(name)
        else:
            launcher.setenv(name, value)
    with pytest.raises(LauncherError, match=said):
        read_place(("n1", "n2"))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 3 of 4 on two nodes."""
    values = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**values, "MASTER_ADDR": "n1", "MASTER_PORT": "2345"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_place(launcher: pytest.MonkeyPatch) -> None:
    place = Place(rank=3, size=4, local_rank=1, local_size=2, master="n1", port=2345, nodes=("n1", "n2"))
    assert read_place(("n1", "n2")) == place
    launcher.delenv("LOCAL_WORLD_SIZE")
    launcher.delenv("LOCAL_RANK")
    assert read_place(("n1", "n2")) == place


def test_a_launchers_mistake_as_a_user() -> None:
    result = run("fabric", RANK="0")
    assert result.returncode == 2, result
    assert "the launcher set some of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT but not " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_check_of_a_node_needs_no_torch() -> None:
    code = (
        "import sys; from moe_lvlm.preflight.node import NodeDemands, check_node; check_node(NodeDemands()); "
        "print([name for name in ('torch', 'rich', 'pydantic', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
