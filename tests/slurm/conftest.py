"""The SLURM cluster that tests share, and its logs in the reports of failed tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.slurm.cluster import Cluster, ClusterError, missing_commands


def started_cluster(*options: str, **sizes: int) -> Cluster:
    """A running cluster; the test is skipped, with the reason, where there cannot be one."""
    missing = missing_commands()
    if missing:
        pytest.skip(f"no SLURM here ({', '.join(missing)} missing); bash launch/slurm/local_cluster.sh install")
    cluster = Cluster(*options, **sizes)
    try:
        cluster.start()
    except ClusterError as error:
        if (cluster.folder / "slurm.conf").exists():
            cluster.stop()
        cluster.remove()
        pytest.skip(f"SLURM does not come up: {error}")
    return cluster


@pytest.fixture(scope="session")
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three nodes of four CPUs. Its folder stays when a test has failed."""
    cluster = started_cluster()
    yield cluster
    cluster.stop()
    if not request.session.testsfailed:
        cluster.remove()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up; jobs that the test leaves are cancelled."""
    shared_cluster.start()
    yield shared_cluster
    shared_cluster.cancel_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the logs of the cluster and its jobs where a test fails."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        report.sections.append((f"SLURM in {cluster.folder}", cluster.tails()))
    return report
