"""A job on a real SLURM: whatever happens to it, the run comes to the numbers of one that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, QueuedRun, resume_all
from tests.tiny_run import tiny_recipe, write_run_inputs
from tests.training.launching import events

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

TWO_NODES = ("--nodes", "2", "--time", "10")
QUICK = ("--no-preflight",)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty dense steps, then sixty sparse ones."""
    folder = tmp_path_factory.mktemp("slurm run")  # with a space: every path of a job has one
    dense, sparse = tiny_recipe(folder)["stages"]
    return write_run_inputs(
        folder,
        stages=[dense | {"steps": 40, "learning_rate": 1e-3}, sparse | {"steps": 60, "learning_rate": 1e-3}],
        train={"precision": "fp32", "log_every": 1, "checkpoint": {"every": 10, "keep_last": 2}},
    )


def train_here(recipe: str | Path, run: Path, *overrides: str) -> Path:
    """Train on this machine, beside SLURM, with two processes."""
    command = [
        ROOT / "launch" / "torchrun.sh",
        "--nproc",
        "2",
        recipe,
        f"output_dir={json.dumps(str(run))}",
        *overrides,
    ]
    done = subprocess.run(["bash", *command], capture_output=True, text=True, check=False)
    assert (run / "DONE").exists(), done.stderr
    return run


@pytest.fixture(scope="module")
def unbroken(recipe: Path) -> Path:
    """The run that nothing happens to."""
    return train_here(recipe, recipe.parent / "unbroken")


@pytest.fixture
def run(recipe: Path, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[QueuedRun]:
    """A run's folder to be; no job outlives the test."""
    name = re.sub(r"\W+", "-", request.node.name)
    queued = QueuedRun(recipe.parent / name, cluster.environment)
    yield queued
    for process in queued.ranks():
        os.kill(process.pid, signal.SIGCONT)


@contextmanager
def without_name(cluster: Cluster, node: str, name: str) -> Iterator[None]:
    """On that node, the other's name resolves to nothing meanwhile."""
    path = cluster.folder / "hosts" / node  # written in its place: the node sees this very file
    text = path.read_text()
    path.write_text("".join(line for line in text.splitlines(keepends=True) if name not in line.split()[1:]))
    try:
        yield
    finally:
        path.write_text(text)


def test_two_nodes_train_as_one_machine(cluster: Cluster, run: QueuedRun, tmp_path: Path) -> None:
    """The quickstart's recipe, a few steps of each stage, with the preflight and by the script that was written."""
    few = [f"stages.{stage}.steps=3" for stage in range(3)]
    run.submit("quickstart", *few, *TWO_NODES)
    run.wait_until_gone()
    run.assert_as_unbroken(train_here("quickstart", tmp_path / "here", *few))
    assert run.story() == ["submit", "start", "end done"]
    [start] = run.noted("start")
    assert start["nodes"] == "n1,n2"
    assert [line["hosts"] for line in run.log.named("world")] == [["n1", "n2"]]
    texts = [(run.folder / "logs" / f"rank-00{rank}.log").read_text() for rank in (0, 1)]
    assert [text.splitlines()[0].rpartition(",")[0] for text in texts] == [
        f"=== attempt 1, job {start['job']}, rank {rank} on n{rank + 1}" for rank in (0, 1)
    ]
    assert "done:" in texts[0]


def test_the_time_limit(run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    """The signal comes before the end, all ranks save, the job is queued again and goes on."""
    # SLURM looks at the time every 30 s, so that the signal may come so much earlier than asked for.
    run.submit(recipe, "--nodes", "2", "--time", "2", "--stop-before", "60", *QUICK)
    paused = run.pause("sparse", 15)
    run.wait_until(lambda: run.noted("stop"), "the stop signal")
    resume_all(paused)
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    assert run.story() == ["submit", "start", "stop", "end stopped", "requeue", "start", "end done"]
    stopped, done = run.noted("end")
    assert stopped["progress"]
    assert [line["checkpoint"] for line in run.noted("start")] == ["", stopped["checkpoint"]]
    assert [line["path"].rpartition("/")[2] for line in run.log.named("stopped")] == [stopped["checkpoint"]]
    assert done["checkpoint"] == "sparse-000060"
    log = (run.folder / "logs" / "rank-001.log").read_text()
    assert log.count("=== attempt") == 2  # appended


def test_a_killed_rank(run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    run.submit(recipe, *TWO_NODES, *QUICK)
    paused = run.pause("sparse", 15)
    paused[1].kill()
    resume_all(paused[:1])
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    assert run.story() == ["submit", "start", "end crash", "requeue", "start", "end done"]
    crash = run.noted("end")[0]
    assert (crash["rank"], crash["node"], crash["progress"]) == (1, "n2", True)
    assert "Killed" in crash["detail"]
    status = json.loads(run.call(sys.executable, "-m", "moe_lvlm", "status", run.folder, "--json").stdout)
    assert status["runs"][0]["state"] == "done"


def test_a_killed_node(cluster: Cluster, run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    """Its daemon and all its processes are gone at once, as when the power fails."""
    run.submit(recipe, *TWO_NODES, *QUICK)
    paused = run.pause("sparse", 15)
    cluster.kill_node("n2")
    try:
        resume_all(paused[:1])
        run.wait_until_gone()
    finally:
        cluster.start()
    run.assert_as_unbroken(unbroken)
    starts = [line["nodes"] for line in run.noted("start")]
    assert starts[0] == "n1,n2"
    assert starts[-1] == "n1,n3"


@pytest.mark.parametrize("partition", ["batch", "grace"])
def test_preemption(run: QueuedRun, recipe: Path, unbroken: Path, partition: str) -> None:
    """A job of a higher partition takes the nodes; with and without time that is granted before."""
    run.submit(recipe, *TWO_NODES, *QUICK, "--partition", partition)
    run.pause("sparse", 15)  # SLURM itself lets them go on, to hear its SIGTERM
    wanted = ["--partition=urgent", "--nodes=3", "--exclusive", "--mem=0", "--time=1", "--output=/dev/null"]
    assert run.call("sbatch", *wanted, "--wrap=sleep 1").returncode == 0
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    assert [line["reason"] for line in run.noted("end")] == ["stopped", "done"]
    stopped = run.noted("end")[0]
    assert stopped["progress"]
    assert run.noted("start")[1]["checkpoint"] == stopped["checkpoint"]
    assert stopped.get("detail", "") == {"batch": "preemption", "grace": ""}[partition]


def test_a_bad_node_is_found_and_left_out(cluster: Cluster, run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    """On n2 the first node's name resolves to nothing."""
    with without_name(cluster, "n2", "n1"):
        run.submit(recipe, *TWO_NODES)
        run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    assert run.story() == ["submit", "start", "bad_node", "end preflight", "requeue", "start", "end done"]
    [bad] = run.noted("bad_node")
    assert bad["node"] == "n2"
    assert "n1" in bad["reason"]
    assert [line["nodes"] for line in run.noted("start")] == ["n1,n2", "n1,n3"]
    assert (run.folder / "slurm" / "excluded").read_text() == "n2\n"
    assert [line["exclude"] for line in run.noted("requeue")] == ["n2"]


def test_cancel_leaves_a_valid_checkpoint(run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    job = run.submit(recipe, *TWO_NODES, *QUICK)
    run.pause("sparse", 15)
    assert run.call("scancel", job).returncode == 0
    run.wait_until_gone()
    assert run.story() == ["submit", "start", "end cancelled"]
    assert run.call(sys.executable, ROOT / "tools" / "verify.py", run.folder).returncode == 0
    [stopped] = run.log.named("stopped")
    assert run.noted("end")[0]["checkpoint"] == Path(stopped["path"]).name
    # and the same script goes on
    assert run.call(sys.executable, "-m", "moe_lvlm", "submit", run.folder / "slurm" / "job.sbatch").returncode == 0
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)


def test_a_hang(run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    """One rank stops answering: the other writes its stacks and names it, and the job is queued again."""
    run.submit(recipe, *TWO_NODES, *QUICK, "train.hang_timeout=15")
    ranks = run.pause("sparse", 15)
    resume_all(ranks[:1])
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    assert run.story() == ["submit", "start", "end hang", "requeue", "start", "end done"]
    assert (run.noted("end")[0]["rank"], run.noted("end")[0]["status"]) == (0, 85)
    [summary] = (run.folder / "hangs").glob("*-summary.json")
    assert "n2" in summary.read_text()
    [stacks] = (run.folder / "hangs").glob("*-rank-000.txt")
    assert "run_step" in stacks.read_text() or "count_step" in stacks.read_text()


def test_an_array_requeues_only_its_own_task(run: QueuedRun, recipe: Path) -> None:
    """Two seeds on a node each; a rank of one is killed."""
    run.submit(recipe, *QUICK, "--processes-per-node", "1", "--time", "10", "--sweep", "seed=0,1")
    sweep = run.folder.with_name(f"{run.folder.name}-sweep")
    whole, broken = (QueuedRun(sweep / f"seed={seed}", run.environment) for seed in (0, 1))
    broken.pause("sparse", 15)[0].kill()
    run.wait_until_gone()
    assert whole.story() == ["submit", "start", "end done"]
    assert broken.story() == ["submit", "start", "end crash", "requeue", "start", "end done"]
    array = whole.noted("submit")[0]["job"]
    assert [one.noted("start")[0]["job"] for one in (whole, broken)] == [f"{array}_0", f"{array}_1"]
    for seed, one in enumerate((whole, broken)):
        assert len(one.log.steps()) == 100
        assert yaml.safe_load((one.folder / "recipe.yaml").read_text())["seed"] == seed
    assert whole.log.losses() != broken.log.losses()


def test_stages_in_a_chain(run: QueuedRun, recipe: Path, unbroken: Path) -> None:
    """A job a stage; the second waits while the first is queued again."""
    run.submit(recipe, *TWO_NODES, *QUICK, "--chain", "train.checkpoint.every=1")
    first, second = (line["job"] for line in run.noted("submit"))
    run.pause("tune", 5)[0].kill()
    run.wait_until_gone()
    run.assert_as_unbroken(unbroken)
    ends = [(line["job"], line["reason"]) for line in run.noted("end")]
    assert ends == [(first, "crash"), (first, "done"), (second, "done")]
    assert (run.folder / "DONE.tune").exists()
    assert run.noted("start")[2]["checkpoint"] == "tune-000040"


def test_attempts_without_progress_are_limited(run: QueuedRun, recipe: Path) -> None:
    """A run that diverges in its first steps makes no checkpoint, however often it is tried."""
    words = ["stages.0.learning_rate=1e30", "stages.0.steps=9", "--max-attempts", "2"]
    run.submit(recipe, *TWO_NODES, *QUICK, *words)
    run.wait_until_gone()
    assert run.story() == ["submit", "start", "end crash", "requeue", "start", "end crash", "give_up"]
    assert "2 attempts" in run.noted("give_up")[0]["reason"]
    assert not (run.folder / "DONE").exists()


def test_a_mistake_is_not_tried_again(run: QueuedRun, recipe: Path) -> None:
    """What `train` refuses with status 2, such as a folder of another run."""
    run.folder.mkdir()
    (run.folder / "notes.txt").write_text("somebody's")
    run.submit(recipe, *TWO_NODES, *QUICK)
    run.wait_until_gone()
    assert run.story() == ["submit", "start", "end user error", "give_up"]
    assert (run.folder / "notes.txt").read_text() == "somebody's"


def test_every_process_starts_inside_the_container(run: QueuedRun, recipe: Path, tmp_path: Path) -> None:
    """By a stand-in for apptainer, which runs what it is given where it is: there is no real one to be had here."""
    program, calls = tmp_path / "apptainer", tmp_path / "calls"
    program.write_text(
        f'#!/bin/bash\necho "$*" >>{calls}\nuntil [ "$1" = image.sif ]; do shift; done\nexec "${{@:2}}"\n'
    )
    program.chmod(0o755)
    inside = QueuedRun(run.folder, run.environment | {"PATH": f"{tmp_path}:{run.environment['PATH']}"})
    image = ["--container", "image.sif", "--container-runtime", "apptainer", "--container-python", sys.executable]
    inside.submit(recipe, *TWO_NODES, *image, "--until", "tune")
    inside.wait_until_gone()
    assert inside.story() == ["submit", "start", "end done"], inside.everything()
    assert (run.folder / "DONE.tune").exists()
    folder = run.folder.parent
    lines = calls.read_text().splitlines()
    assert {line.partition(" image.sif ")[0] for line in lines} == {f"exec --bind {folder}:{folder} --pwd {folder}"}
    started = [line.partition("-m moe_lvlm ")[2].split()[0:2] for line in lines]
    assert sorted(started) == [
        *[["preflight", "fabric"]] * 2, *[["preflight", "node"]] * 2, *[["train", f"{folder}".split()[0]]] * 2,
    ]  # fmt: skip


def test_stop_keeps_a_job_from_being_queued_again(run: QueuedRun, recipe: Path) -> None:
    job = run.submit(recipe, *TWO_NODES, *QUICK)
    paused = run.pause("sparse", 15)
    (run.folder / "slurm" / "STOP").touch()
    assert run.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    run.wait_until(lambda: run.noted("stop"), "the stop signal")
    resume_all(paused)
    run.wait_until_gone()
    assert run.story() == ["submit", "start", "stop", "end stopped"]
    assert len(run.log.named("stopped")) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--partition", "members"], "Invalid account or account/partition combination specified"),
        (["--partition", "nosuch"], "Invalid partition name specified"),
        (["--nodes", "64"], "stage tune: global_batch 8 is not a multiple"),
        (["--nodes", "4"], "Requested node configuration is not available"),
        (["--cpus-per-process", "99"], "Requested node configuration is not available"),
        (["--job-name", "my job"], "job_name: 'my job'"),
        (["--time", "yesterday"], "time: 'yesterday'"),
        (["--partition", "a b"], "partition: 'a b'"),
        (["--until", "spars"], "did you mean 'sparse'?"),
        (["stages.0.stepz=3"], "did you mean 'steps'"),
        (["data.image_root=nowhere"], "nowhere/train.json: no such file"),
        (["--site", "nosite.yaml"], "nosite.yaml: no such file"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    run: QueuedRun, recipe: Path, words: list[str], sentence: str
) -> None:
    done = run.try_submit(recipe, *words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "/tmp" not in done.stderr.replace(str(run.folder.parent), "")  # it names no file that the user never saw
    assert "Traceback" not in done.stderr
    assert run.in_queue() == []
    assert not run.folder.exists()


def test_a_second_job_for_the_same_run_is_refused(run: QueuedRun, recipe: Path) -> None:
    job = run.submit(recipe, *TWO_NODES, *QUICK)
    done = run.try_submit(recipe, *TWO_NODES)
    assert done.returncode == 2
    assert f"job {job}" in done.stderr
    script = run.folder / "slurm" / "job.sbatch"
    assert f"job {job}" in run.call(sys.executable, "-m", "moe_lvlm", "submit", script).stderr
    run.wait_until_gone()
    done = run.try_submit(recipe, *TWO_NODES)
    assert "trained already" in done.stderr


def test_the_script_can_be_edited_and_is_kept(run: QueuedRun, recipe: Path) -> None:
    """A directive in the wrong place is found; a script of the user's is not lost when another is written."""
    job = run.submit(recipe, *TWO_NODES, *QUICK)
    run.call("scancel", job)
    run.wait_until_gone()
    script = run.folder / "slurm" / "job.sbatch"
    script.write_text(script.read_text() + "#SBATCH --mem=0\n")
    done = run.call(sys.executable, "-m", "moe_lvlm", "submit", script)
    assert done.returncode == 2
    assert "SLURM passes over it" in done.stderr
    run.call("scancel", run.submit(recipe, *TWO_NODES, *QUICK))
    assert (run.folder / "slurm" / "job.sbatch.1").read_text().endswith("#SBATCH --mem=0\n")


def test_dry_run_writes_nothing(run: QueuedRun, recipe: Path) -> None:
    done = run.try_submit(recipe, *TWO_NODES, "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert "to start at" in done.stderr  # SLURM's own answer
    assert not run.folder.exists()
    assert events(run.folder).lines == []
