"""One instance that answers HTTP, from its start to its end: a real process, registered in a real cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import requests

import rollcall
from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from rollcall.registry import Instance
from tests.waiting import eventually, free_port

ROOT = Path(__file__).parents[2]


class Front:
    """A process of `tests.integration.front`."""

    def __init__(self, folder: Path, cluster: Cluster, guard: Guard, *flags: str) -> None:
        self._log = folder / f"{time.monotonic_ns()}.log"
        self._registry = rollcall.ConsulRegistry(cluster.addresses)
        with self._log.open("w") as output:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.front", *flags],
                cwd=ROOT,
                env={**os.environ, "ROLLCALL_CONSUL": ",".join(cluster.addresses)},
                stdout=output,
                stderr=output,
                start_new_session=True,  # the guard ends whole groups
            )
        guard.watch(self.child.pid)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def said(self, pattern: str) -> str:
        """Wait until a line of the log matches; return the first group."""
        found = eventually(f"it says {pattern}", lambda: re.search(pattern, self.log))
        assert found
        return found[1]

    def url(self, path: str) -> str:
        target = self.said(r"serves at (\S+:\d+),")
        return f"http://{target}{path}"

    def registered(self) -> Instance:
        """Wait until it passes, and return what is known of it."""
        return eventually("it passes", lambda: self._registry.instances("front"))[0]


Start = Callable[..., Front]


@pytest.fixture
def start(cluster: Cluster, guard: Guard, tmp_path: Path) -> Iterator[Start]:
    started = list[Front]()

    def start_one(*flags: str) -> Front:
        started.append(Front(tmp_path, cluster, guard, *flags))
        return started[-1]

    yield start_one
    for one in started:
        one.child.terminate()
        one.child.wait(30)


def checks(cluster: Cluster, instance: str) -> list[Any]:
    """Return what the servers know of how an instance is checked."""
    answers = [requests.get(f"http://{each}/v1/agent/checks", timeout=5).json() for each in cluster.addresses]
    return [check for answer in answers for check in answer.values() if check["ServiceID"] == instance]


def test_it_registers_with_an_http_check_that_passes(start: Start, cluster: Cluster) -> None:
    front = start("--tags", "public", "--meta", "node=worker-1", "--drain", "0")
    instance = front.registered()
    assert instance.meta["node"] == "worker-1"
    assert front.url("") == f"http://{instance.target}"
    assert (instance.meta["protocol"], instance.tags) == ("http", ("public",))
    checked = front.url("/livez")
    check = eventually("it is checked", lambda: next((c for c in checks(cluster, instance.id) if c["Output"]), None))
    assert check
    assert (check["Type"], check["Status"]) == ("http", "passing")
    assert checked in check["Output"]

    assert requests.get(front.url("/hello"), timeout=5).text == "hello"
    metrics = requests.get(f"http://127.0.0.1:{instance.meta['http_port']}/metrics", timeout=5).text
    assert 'http_server_handled_total{http_code="200",http_method="GET",http_route="/hello"} 1.0' in metrics
    assert "livez" not in metrics


def test_sigterm_finishes_what_is_in_flight_and_ends_streams_in_time(start: Start) -> None:
    front = start("--drain", "2", "--grace", "3")
    instance = front.registered()
    with futures.ThreadPoolExecutor() as pool, requests.Session() as kept:
        assert "connection" not in kept.get(front.url("/hello"), timeout=5).headers
        waiting = pool.submit(requests.get, front.url("/wait/1"), timeout=10)
        stream = requests.get(front.url("/stream"), timeout=10, stream=True)
        lines = stream.iter_lines(chunk_size=1)
        assert next(lines) == b"data: first"
        begun = time.monotonic()
        front.child.send_signal(signal.SIGTERM)
        front.said("(drains)")
        assert kept.get(front.url("/hello"), timeout=5).headers["connection"] == "close"
        assert waiting.result().text == "done"
        assert b"data: last" in list(lines)
        assert front.child.wait(30) == 0
        assert 5 <= time.monotonic() - begun < 15, "the stream would go on for ever"
    assert not front._registry.instances("front")
    assert f"{instance.id} has ended" in front.log
    assert "Traceback" not in front.log


def test_a_port_that_is_taken(start: Start) -> None:
    port = str(free_port())
    first = start("--port", port, "--drain", "0")
    first.registered()
    second = start("--port", port)
    assert second.child.wait(30) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in second.log
