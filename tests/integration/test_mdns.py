"""The same system without Consul: trouble while 16 callers call, of instances that find each other by multicast."""

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.guard import Guard
from rollcall.registry.mdns import MdnsRegistry
from tests.integration import test_trouble as trouble
from tests.integration.fleet import Fleet
from tests.integration.test_trouble import WORKS

pytestmark = pytest.mark.trouble

EACH = pytest.mark.parametrize("name", ["sum", "hello"])


class MdnsFleet(Fleet):
    """Instances that have no Consul."""

    def __init__(self, run: Path, guard: Guard) -> None:
        group = uuid.uuid4().hex
        self.run, self.guard = run, guard
        self.environment = {**os.environ, "ROLLCALL_REGISTRY": "mdns", "ROLLCALL_MDNS_GROUP": group}
        self.mdns = self.registry = MdnsRegistry(group=group)
        self._programs = {}

    def checks(self, name: str) -> dict[str, object]:
        """Return how a service's processes are, and what is heard of them."""
        heard = {each.id: each.target for each in self.registry.instances(name, failing=True)}
        return {"heard": heard, "runs": {each: self.runs(each) for each in self._programs}}

    def close(self) -> None:
        for instance in self._programs:
            self.process(instance).kill()
        self.mdns.close()


@pytest.fixture
def fleet(tmp_path: Path, guard: Guard) -> Iterator[MdnsFleet]:
    fleet = MdnsFleet(tmp_path, guard)
    yield fleet
    fleet.close()


@EACH
def test_an_instance_is_killed(fleet: MdnsFleet, report: list[str], name: str) -> None:
    trouble.test_an_instance_is_killed(fleet, report, WORKS[name])


@EACH
def test_a_rolling_restart(fleet: MdnsFleet, report: list[str], name: str) -> None:
    trouble.test_a_rolling_restart(fleet, report, WORKS[name])


def test_an_instance_freezes(fleet: MdnsFleet, report: list[str]) -> None:
    trouble.test_an_instance_freezes(fleet, report, WORKS["sum"])


@EACH
def test_an_instance_is_added(fleet: MdnsFleet, report: list[str], name: str) -> None:
    trouble.test_an_instance_is_added(fleet, report, name)


def test_a_chain_of_calls_over_a_rolling_restart(fleet: MdnsFleet, report: list[str]) -> None:
    trouble.test_a_rolling_restart(fleet, report, WORKS["sum behind student"])


def test_an_instance_with_an_id_that_is_taken_gives_way(fleet: MdnsFleet) -> None:
    async def scenario() -> None:
        fleet.start("sum-1")
        await fleet.pass_all("sum", 1)
        first = fleet.process("sum-1")
        fleet.start("sum-1")
        second = fleet.process("sum-1")
        assert await asyncio.to_thread(second.wait, 60), "it ends by itself"
        assert "belongs to an instance of 'sum' at 127.0.0.1:" in fleet.log("sum-1")
        assert first.running()
        await fleet.pass_all("sum", 1)
        first.kill()

    asyncio.run(scenario())
