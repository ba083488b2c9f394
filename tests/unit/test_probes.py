"""The plain HTTP port: an event loop that hangs can be seen to hang."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import requests
from prometheus_client import CollectorRegistry, Counter

from rollcall.probes import Probes


class Site:
    """Probes of an event loop that runs on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.ready = threading.Event()
        metrics = CollectorRegistry()
        Counter("calls", "Calls.", registry=metrics).inc(3)
        self.probes = Probes(("127.0.0.1", 0), metrics, self.ready.is_set, lambda: {"told": "李白"}, self.loop)

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.probes.port}{path}", headers=headers, timeout=5)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.probes.close()
    site.loop.call_soon_threadsafe(site.loop.stop)
    site.thread.join(5)
    site.loop.close()


def test_metrics(site: Site) -> None:
    answer = site.get("/metrics?name[]=calls")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "calls_total 3.0" in answer.text
    assert "# EOF" in site.get("/metrics", Accept="application/openmetrics-text").text


def test_readyz_says_whether_it_is_ready(site: Site) -> None:
    assert (site.get("/readyz").status_code, site.get("/readyz").text) == (503, "not ready\n")
    site.ready.set()
    assert (site.get("/readyz").status_code, site.get("/readyz").text) == (200, "ready\n")


def test_livez_says_whether_the_event_loop_answers(site: Site) -> None:
    assert site.get("/livez").status_code == 200
    unblock = threading.Event()
    site.loop.call_soon_threadsafe(unblock.wait, 30)
    assert site.get("/livez").status_code == 503
    assert site.get("/metrics").status_code == 200, "the rest does not depend on the loop"
    unblock.set()
    assert site.get("/livez").status_code == 200


def test_settings_are_told(site: Site) -> None:
    answer = site.get("/settings")
    assert (answer.json(), answer.headers["content-type"]) == ({"told": "李白"}, "application/json")


@pytest.mark.parametrize("path", ["/", "/metric", "/readyz/"])
def test_anything_else_is_not_there(site: Site, path: str) -> None:
    answer = site.get(path)
    assert answer.status_code == 404
    assert "expected /metrics, /livez, /readyz or /settings" in answer.text


def test_a_client_that_says_nothing_keeps_nobody_waiting(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.probes.port)):
        assert site.get("/livez").status_code == 200
