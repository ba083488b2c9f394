"""What `rollcall new` makes is as good as ours: tested, started beside what runs, and called through discovery."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local import process
from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests import making
from tests.integration.fleet import ROOT, Fleet
from tests.making import OUTSIDE, SECONDS
from tests.waiting import eventually


class Workshop:
    """A folder in which services are made, beside a Consul cluster and a gateway."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.env = {"ROLLCALL_CONSUL": ",".join(fleet.cluster.addresses)}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        return making.run(*command, cwd=cwd or self.folder, **self.env)

    def new(self, *arguments: str) -> str:
        return making.new(self.folder, *arguments)

    def start(self, name: str, *command: str, cwd: Path | None = None) -> None:
        started = process.start(name, command, run=self.fleet.run, cwd=cwd or self.folder, env={**OUTSIDE, **self.env})
        self.fleet.guard.watch(started.pid)
        eventually(f"{name} passes", lambda: self.passes(name), SECONDS)

    def passes(self, name: str) -> bool:
        assert self.fleet.runs(name), self.fleet.process(name).tail(30)
        return bool(self.fleet.passing(name))

    def stop(self, name: str) -> None:
        assert self.fleet.process(name).stop(40)
        eventually(f"{name} has gone", lambda: not self.fleet.passing(name))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("new"), module_cluster, guard)
    try:
        fleet.start("gateway-1")
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.wheel(tmp_path_factory.mktemp("wheels"))


def test_a_service_in_a_repository(repository: Path, fleet: Fleet, report: list[str]) -> None:
    here = Workshop(repository, fleet)
    begun = time.monotonic()
    assert "made order-history:" in here.new("order-history")
    here.run("make", "proto")
    here.start("order-history", ".venv/bin/python", "-m", "services.order_history", "--tags", "public")
    called = here.run(".venv/bin/python", "-m", "rollcall", "call", "order-history.Call", '{"name": "李白"}')
    report.append(f"from `rollcall new` to the first answer: {time.monotonic() - begun:.1f} s")
    assert called == '{"text": "Hello 李白"}\n'
    (gateway,) = fleet.registry.instances("gateway")
    url = f"http://{gateway.target}/v1/order-history/Call"

    def through_the_gateway() -> bool:
        answer = requests.post(url, json={"name": "李白"}, timeout=10)
        return answer.status_code == 200 and answer.json() == {"text": "Hello 李白"}

    eventually("the gateway has heard of it", through_the_gateway, 60)
    changed = here.run(".venv/bin/python", "-m", "rollcall", "kv", "set", "order-history", "most", "2")
    assert "rollcall/order-history/most" in changed
    refused = subprocess.run(
        [".venv/bin/python", "-m", "rollcall", "call", "order-history.Count", '{"count": 3}'],
        cwd=repository,
        env={**OUTSIDE, **here.env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "count: must be from 0 to 2, found 3" in refused.stderr
    here.run(".venv/bin/python", "-m", "rollcall", "kv", "unset", "order-history", "most")
    here.stop("order-history")


def test_a_front_in_a_repository(repository: Path, fleet: Fleet) -> None:
    here = Workshop(repository, fleet)
    here.new("front", "--type", "web")
    here.start("front", ".venv/bin/python", "-m", "services.front")
    (front,) = fleet.registry.instances("front")
    assert requests.get(f"http://{front.target}/hello/world", timeout=10).json() == {"text": "Hello world"}
    here.stop("front")


def test_what_is_made_in_a_repository_is_as_it_is_kept_there(repository: Path, fleet: Fleet) -> None:
    """Of the shortest name and of the longest, too: clean, typed, and tested."""
    here = Workshop(repository, fleet)
    longest = "abcdefghijklm-nopqrstuvwxy"
    for kind in ("srv", "web"):
        here.new(kind[0], "--type", kind)
        here.new(longest, "--type", kind, "--namespace", kind)
    here.run("make", "proto")
    made = [f"services/{name}" for name in ("s", "w", "srv_abcdefghijklm_nopqrstuvwxy")]
    made += ["services/web_abcdefghijklm_nopqrstuvwxy", "services/order_history", "services/front"]
    python = [".venv/bin/python", "-m"]
    here.run(*python, "ruff", "check", *made)
    here.run(*python, "ruff", "format", "--check", *made)
    here.run(*python, "mypy", *made)
    here.run(str(ROOT / ".venv/bin/buf"), "lint", cwd=repository / "protos")
    here.run(*python, "pytest", "-p", "no:cacheprovider", *made)


def alone(folder: Path, wheels: Path, name: str) -> Path:
    """Return the folder of a service that was made alone, with the library where no package index has it."""
    shutil.copytree(wheels, folder / name / "wheels")
    return folder / name


def test_a_service_alone(tmp_path: Path, fleet: Fleet, wheels: Path, report: list[str]) -> None:
    shop = Workshop(tmp_path, fleet)
    begun = time.monotonic()
    assert "made shop in shop:" in shop.new("shop")
    folder = alone(tmp_path, wheels, "shop")
    shop.start("shop", "make", "run", cwd=folder)
    called = shop.run(".venv/bin/rollcall", "call", "shop.Call", '{"name": "李白"}', cwd=folder)
    report.append(f"from `rollcall new` to the first answer, all installed anew: {time.monotonic() - begun:.1f} s")
    assert called == '{"text": "Hello 李白"}\n'
    shop.run("make", "test", cwd=folder)
    shop.stop("shop")


def test_a_front_alone(tmp_path: Path, fleet: Fleet, wheels: Path) -> None:
    shop = Workshop(tmp_path, fleet)
    shop.new("shop-front", "--type", "web")
    folder = alone(tmp_path, wheels, "shop-front")
    shop.start("shop-front", "make", "run", cwd=folder)
    assert "shop-front" in shop.run(".venv/bin/rollcall", "instances", "shop-front", cwd=folder)
    (front,) = fleet.registry.instances("shop-front")
    assert requests.get(f"http://{front.target}/hello/world", timeout=10).json() == {"text": "Hello world"}
    shop.run("make", "test", cwd=folder)
    shop.stop("shop-front")
