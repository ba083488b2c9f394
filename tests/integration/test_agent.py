"""A client agent between the services and the servers of Consul: when it dies and returns, nothing is lost."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import rollcall
from deploy.local.cluster import AGENT, Cluster, free_ports
from deploy.local.guard import Guard
from tests.integration.fleet import CALLS, Fleet, eventually
from tests.integration.test_trouble import SUMS, everything, none_failed

pytestmark = pytest.mark.trouble

GRACE = 15.0
"""Seconds, by default: see `CallSettings.empty_grace`."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Cluster]:
    *ports, agent = free_ports(4)
    with Cluster(tmp_path_factory.mktemp("agent"), ports, consul_binary, agent=agent, on_start=guard.watch) as cluster:
        yield cluster


@pytest.mark.parametrize("data", ["kept", "lost"])
def test_the_agent_is_killed_and_returns(fleet: Fleet, cluster: Cluster, report: list[str], data: str) -> None:
    servers = rollcall.ConsulRegistry(cluster.addresses)

    async def scenario() -> None:
        async with everything(fleet) as tallies:
            for address in cluster.addresses:
                held = await asyncio.to_thread(requests.get, f"http://{address}/v1/agent/services", timeout=5)
                assert held.json() == {}, "all are registered at the agent"
            await asyncio.to_thread(cluster.server(AGENT).kill)
            away = time.monotonic()
            if data == "lost":
                cluster.wipe_data(AGENT)
            await eventually("the servers count it out", lambda: not servers.instances("sum"), 60)
            before = {name: tally.answered.total() for name, tally in tallies.items()}
            noticed = time.monotonic()
            await eventually("longer than any grace", lambda: time.monotonic() - noticed > GRACE + 1, 30)
            during = {name: tally.answered.total() - before[name] for name, tally in tallies.items()}
            await asyncio.to_thread(cluster.start_server, AGENT)
            returned = time.monotonic()
            for name in tallies:
                await fleet.pass_all(name, 3)
            whole = time.monotonic() - returned
            await eventually("the grace is over", lambda: time.monotonic() - returned > GRACE + 1, 30)
            assert {each.id for each in servers.instances("sum")} == set(SUMS)
        none_failed(
            report,
            tallies,
            f"away for {returned - away:.0f} s, {sum(during.values()):,} calls meanwhile; registrations whole "
            f"{whole:.2f} s after its return",
        )
        assert min(during.values()) > CALLS / 2

    asyncio.run(scenario())
