"""Fixtures for every test that needs a real Consul."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import consul_binary as binaries
from deploy.local.cluster import SERVERS, Cluster, free_ports
from deploy.local.guard import Guard


@pytest.fixture(scope="session")
def guard() -> Iterator[Guard]:
    """Kills what it was told to watch when the session ends, however it ends."""
    with Guard() as guard:
        yield guard


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    return binaries.consul_binary()


@pytest.fixture(scope="module")
def module_cluster(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Cluster]:
    run = tmp_path_factory.mktemp("consul")
    with Cluster(run, free_ports(), consul_binary, on_start=guard.watch) as cluster:
        yield cluster
    shutil.rmtree(run / "data", ignore_errors=True)  # the logs are worth keeping, the data is large


@pytest.fixture
def cluster(module_cluster: Cluster) -> Cluster:
    """Three healthy servers; they are the module's, so that tests may hurt them without paying for a start each."""
    for n in SERVERS:
        module_cluster.server(n).signal(signal.SIGCONT)
        module_cluster.start_server(n)
    module_cluster.wait_for_leader()
    return module_cluster
