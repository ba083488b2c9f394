"""Two datacenters: its own instances are called while one of them can be, and the other's else; none fails."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import pytest

import rollcall
from deploy.local.cluster import SERVERS, Cluster, free_ports
from deploy.local.guard import Guard
from rollcall.registry import RegistryUnavailableError
from tests.integration.fleet import CALLS, ROOT, SYNC_SECONDS, Fleet, Tally, eventually, load
from tests.integration.test_trouble import WORKS, Work, none_failed, start

pytestmark = pytest.mark.trouble


@pytest.fixture(scope="module")
def clusters(
    tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard
) -> Iterator[tuple[Cluster, Cluster]]:
    run, ports = tmp_path_factory.mktemp("datacenters"), free_ports(2 * len(SERVERS))
    ours, theirs = ports[: len(SERVERS)], ports[len(SERVERS) :]
    both = (
        Cluster(run, ours, consul_binary, others={"dc2": theirs}, on_start=guard.watch),
        Cluster(run, theirs, consul_binary, datacenter=2, others={"dc1": ours}, on_start=guard.watch),
    )
    with ThreadPoolExecutor() as pool:
        list(pool.map(Cluster.start, both))
        try:
            list(pool.map(Cluster.wait_for_others, both))
            yield both
        finally:
            list(pool.map(Cluster.stop, both))


@pytest.fixture
def fleets(tmp_path: Path, clusters: tuple[Cluster, Cluster], guard: Guard) -> Iterator[tuple[Fleet, Fleet]]:
    both = Fleet(tmp_path, clusters[0], guard), Fleet(tmp_path, clusters[1], guard)
    yield both
    for fleet in both:
        fleet.close()


async def started(fleets: tuple[Fleet, Fleet], name: str) -> tuple[list[str], list[str]]:
    """Start two instances of a service in each datacenter, and return their ids."""
    ids = [f"{name}-1", f"{name}-2"], [f"{name}-3", f"{name}-4"]
    for fleet, names in zip(fleets, ids, strict=True):
        for instance in names:
            start(fleet, instance)
    for fleet in fleets:
        await fleet.pass_all(name, 2)
    return ids


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM], ids=["killed", "stopped"])
@pytest.mark.parametrize("name", ["sum", "hello"])
def test_it_goes_to_the_other_and_comes_back(
    fleets: tuple[Fleet, Fleet], report: list[str], name: str, number: Signals
) -> None:
    async def scenario() -> None:
        work, here = WORKS[name], fleets[0]
        ours, theirs = await started(fleets, name)
        async with work.calling(here) as call, load(call, instances=2) as tally:
            assert set(tally.answered) == {*ours}
            await asyncio.gather(*(asyncio.to_thread(end, here, instance, number) for instance in ours))
            await only(tally, theirs)
            await here.pass_all(name, 0)  # calls may have gone to the other before Consul knew
            for instance in ours:
                here.start(instance)
            await here.pass_all(name, 2)
            await only(tally, ours)
        none_failed(report, {name: tally})

    asyncio.run(scenario())


def test_settings_are_set_and_shown_in_ones_own(fleets: tuple[Fleet, Fleet]) -> None:
    """An instance follows the keys of its own datacenter."""
    ours, _ = asyncio.run(started(fleets, "sum"))
    ran = subprocess.run(
        [sys.executable, "-m", "rollcall", "kv", "set", "sum", "log-level", "debug", "--json"],
        env=fleets[0].environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = {each["instance"]: each["settings"][0]["value"] for each in json.loads(ran.stdout)}
    assert told == dict.fromkeys(ours, "debug")
    rollcall.ConsulRegistry(fleets[0].cluster.addresses).delete("rollcall/sum/log-level")


async def only(tally: Tally, ids: list[str]) -> None:
    """Wait until these answer all calls, many of them, and nobody else does."""
    since = tally.answered.copy()

    def answer() -> bool:
        nonlocal since
        new = tally.answered - since
        if not set(new) <= set(ids):
            since = tally.answered.copy()
        return set(new) == set(ids) and new.total() > CALLS / 4

    try:
        await eventually(f"only {ids} answer", answer, SYNC_SECONDS)
    except AssertionError as error:
        raise AssertionError(f"{error}; so many have: {tally.answered - since}; failed: {tally.failed[:3]}") from None


def end(fleet: Fleet, instance: str, number: Signals) -> None:
    if number == SIGKILL:
        fleet.kill(instance)
    else:
        fleet.stop(instance)


def test_the_other_is_away(fleets: tuple[Fleet, Fleet], report: list[str]) -> None:
    """Its Consul, that is: at home nobody notices, and once it is back it is turned to again."""

    async def scenario() -> None:
        work: Work = WORKS["sum"]
        here, there = fleets
        ours, theirs = await started(fleets, "sum")
        async with work.calling(here) as call, load(call, instances=2) as tally:
            for n in SERVERS:
                await asyncio.to_thread(there.cluster.stop_server, n, SIGKILL)
            with pytest.raises(RegistryUnavailableError):
                await asyncio.to_thread(here.registry.instances, "sum", certain=True)
            found = await asyncio.to_thread(here.registry.instances, "sum")
            assert [each.id for each in found] == ours
            before = tally.answered.total()
            await eventually("calls go on", lambda: tally.answered.total() > before + CALLS, 60)
            assert set(tally.answered) == {*ours}
            await asyncio.to_thread(there.cluster.start)
            await asyncio.to_thread(there.cluster.wait_for_others)
            await there.pass_all("sum", 2)
            for instance in ours:
                await asyncio.to_thread(here.kill, instance)
            await eventually("the other's are called", lambda: set(theirs) <= set(tally.first))
        none_failed(report, {"sum": tally})

    asyncio.run(scenario())
