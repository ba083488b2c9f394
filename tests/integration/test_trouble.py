"""It keeps answering: each test calls all the while from 16 callers, does its worst, and counts what failed."""

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

import rollcall
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall import context
from tests.integration.fleet import CALLERS, CALLS, Call, Fleet, eventually, holders, load

pytestmark = pytest.mark.trouble

SUMS = ("sum-1", "sum-2", "sum-3")


def add(channel: rollcall.Channel) -> Call:
    """Return the call that the tests make: of a method that may be tried again."""
    stub = sum_pb2_grpc.SumServiceStub(channel)
    return lambda: stub.Add(sum_pb2.AddRequest(num1=333, num2=666))


def do(channel: rollcall.Channel, traces: list[str]) -> Call:
    """Return a call of a method that must not run twice; `traces` gets what to find it by in the instances' logs."""
    stub = person_pb2_grpc.PersonServiceStub(channel)

    def call() -> Awaitable[person_pb2.Person]:
        handled = context.incoming(None, None)
        context.current.set(handled)
        traces.append(handled.trace_id)
        return stub.Do(person_pb2.Person(name="李白", age=333))

    return call


async def home_of(fleet: Fleet, instance: str) -> int:
    """Return the number of the one server that holds an instance's registration."""
    await eventually("one server holds it", lambda: len(holders(fleet.cluster, instance)) == 1)
    (home,) = holders(fleet.cluster, instance)
    return home


def listed(fleet: Fleet) -> list[str]:
    """Return the id of each registration in the cluster's list, passing or not."""
    return sorted(each["ServiceID"] for each in fleet.cluster.get("/v1/catalog/service/sum"))


def ghosts(fleet: Fleet, server: int) -> set[str]:
    """Return the ids that this server holds a registration of beside another server."""
    held = {instance: holders(fleet.cluster, instance) for instance in SUMS}
    return {instance for instance, servers in held.items() if server in servers and len(servers) > 1}


async def started(fleet: Fleet, *instances: str) -> None:
    for instance in instances:
        fleet.start(instance)
    for name, count in Counter(instance.rpartition("-")[0] for instance in instances).items():
        await fleet.pass_all(name, count)


def test_an_instance_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            for instance in SUMS[:2]:
                await asyncio.to_thread(fleet.kill, instance)
                await fleet.pass_all("sum", 2)
                fleet.start(instance)
                await fleet.pass_all("sum", 3)
                tally.first.clear()
                await eventually("it is called again", functools.partial(tally.first.get, instance))
        report.append(str(tally))
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_a_rolling_restart(fleet: Fleet, report: list[str]) -> None:
    """SIGTERM each instance in turn and start it again; also with a method that must not run twice."""

    async def scenario() -> None:
        people = ("person-1", "person-2", "person-3")
        await started(fleet, *SUMS, *people)
        traces: list[str] = []

        async with (
            rollcall.dial("sum", registry=fleet.registry) as sums,
            rollcall.dial("person", registry=fleet.registry) as persons,
            load(add(sums)) as adding,
            load(do(persons, traces)) as doing,
        ):
            for instances in zip(SUMS, people, strict=True):
                await asyncio.gather(*(asyncio.to_thread(fleet.stop, instance) for instance in instances))
                for instance in instances:
                    fleet.start(instance)
                for name in ("sum", "person"):
                    await fleet.pass_all(name, 3)
        report.append(str(adding))
        report.append(f"not idempotent: {doing}")
        assert not adding.failed, adding.failed[:3]
        assert not doing.failed, doing.failed[:3]
        for instance in people:
            await asyncio.to_thread(fleet.stop, instance)
        logged = "".join(fleet.log(instance) for instance in people)
        assert Counter({trace: logged.count(trace) for trace in traces}) == Counter(traces), "run once each"

    asyncio.run(scenario())


def test_an_instance_freezes(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry, deadline=5) as channel, load(add(channel)) as tally:
            fleet.signal("sum-2", SIGSTOP)
            await asyncio.sleep(3)  # the scenario's own measure, not a wait for anything
            fleet.signal("sum-2", SIGCONT)
            await fleet.pass_all("sum", 3)
            tally.first.clear()
            await eventually("it is called again", lambda: "sum-2" in tally.first)
        report.append(str(tally))
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_the_consul_leader_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            leader = fleet.cluster.leader()
            begun = time.monotonic()
            await asyncio.to_thread(fleet.cluster.stop_server, leader, SIGKILL)
            await eventually("another leader", lambda: fleet.cluster.leader() not in (0, leader))
            elected = time.monotonic() - begun
            await fleet.pass_all("sum", 3)
            # Discovery works on: a change is heard of with the new leader.
            fleet.start("sum-4")
            await eventually("a new instance is called", lambda: "sum-4" in tally.first)
        report.append(f"{tally}; a new leader after {elected:.1f} s")
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_the_server_of_a_registration_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            home = await home_of(fleet, "sum-1")
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGKILL)
            _, moved = await eventually("sum-1 is registered elsewhere", lambda: holders(fleet.cluster, "sum-1"))
            await fleet.pass_all("sum", 3)
            await asyncio.to_thread(fleet.cluster.start_server, home)
            # Every instance that it had is back on it with its data, until its owner has removed it there too.
            _, cleaned = await eventually("no ghost", lambda: listed(fleet) == sorted(SUMS) and not ghosts(fleet, home))
            await asyncio.to_thread(fleet.cluster.wait_for_leader)
            assert listed(fleet) == sorted(SUMS)
        report.append(f"{tally}; registered elsewhere after {moved:.2f} s, no ghost {cleaned:.2f} s after its return")
        assert moved < 3
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_the_server_of_a_registration_freezes(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            home = await home_of(fleet, "sum-1")
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGSTOP)
            _, moved = await eventually("sum-1 is registered elsewhere", lambda: holders(fleet.cluster, "sum-1"))
            fleet.start("sum-4")
            await eventually("a new instance is called", lambda: "sum-4" in tally.first, 30)
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGCONT)
            await fleet.pass_all("sum", 4)
        report.append(f"{tally}; registered elsewhere after {moved:.2f} s")
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_an_instance_is_killed_under_calls_that_must_not_run_twice(fleet: Fleet, report: list[str]) -> None:
    """Those that were with it are lost, and reported so; none is run again elsewhere."""

    async def scenario() -> None:
        people = ("person-1", "person-2", "person-3")
        await started(fleet, *people)
        traces: list[str] = []
        async with (
            rollcall.dial("person", registry=fleet.registry) as channel,
            load(do(channel, traces)) as tally,
        ):
            await asyncio.to_thread(fleet.kill, "person-2")
            await fleet.pass_all("person", 2)
        report.append(str(tally))
        assert {code for _, code, _ in tally.failed} <= {"UNAVAILABLE"}
        assert len(tally.failed) <= CALLERS
        for instance in ("person-1", "person-3"):
            await asyncio.to_thread(fleet.stop, instance)
        logged = "".join(fleet.log(instance) for instance in people)
        assert max(logged.count(trace) for trace in traces) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("data", ["kept", "lost"])
def test_all_of_consul_is_away(fleet: Fleet, report: list[str], data: str) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        cluster = fleet.cluster
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            await asyncio.gather(*(asyncio.to_thread(cluster.stop_server, n, SIGKILL) for n in (1, 2, 3)))
            away = time.monotonic()
            if data == "lost":
                for n in (1, 2, 3):
                    cluster.wipe_data(n)
            before = tally.answered.total()
            await asyncio.sleep(20)  # the scenario's own measure
            during = tally.answered.total() - before
            await asyncio.to_thread(cluster.start)
            returned = time.monotonic()
            whole = await fleet.pass_all("sum", 3)
            # Long enough for what the callers hold on to without Consul to have been given up.
            await eventually("the grace is over", lambda: time.monotonic() - returned > 16, 20)
            assert fleet.passing("sum") == set(SUMS)
        report.append(
            f"{tally}; away for {returned - away:.0f} s, {during:,} calls meanwhile; registrations whole {whole:.2f} s "
            f"after its return"
        )
        assert during > CALLS
        assert whole < 5
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_an_instance_is_added(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *SUMS)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            fleet.start("sum-4")
            await eventually("it is ready", lambda: "is registered" in fleet.log("sum-4"))
            ready = time.monotonic()
            await eventually("it is called", lambda: "sum-4" in tally.first)
        took = max(0.0, tally.first["sum-4"] - ready)
        report.append(f"{tally}; called {1000 * took:.0f} ms after it was seen to be ready")
        assert took < 1
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_an_instance_only_fails(fleet: Fleet, report: list[str], tmp_path: Path) -> None:
    async def scenario() -> None:
        broken = tmp_path / "broken"
        fleet.environment["BROKEN"] = str(broken)
        fleet.start("sum-3", module="tests.integration.failing")
        for instance in SUMS[:2]:
            fleet.start(instance)
        await fleet.pass_all("sum", 3)
        async with rollcall.dial("sum", registry=fleet.registry) as channel, load(add(channel)) as tally:
            await eventually("it is called", lambda: "sum-3" in tally.first)
            broken.touch()
            begun = time.monotonic()
            await eventually("a failure", lambda: tally.failed)
            # Failures stop when none has come for a second, at hundreds of calls a second to each instance.
            await eventually("failures stop", lambda: time.monotonic() - tally.failed[-1][0] > 1, 5)
            ejected = tally.failed[-1][0] - begun
            broken.unlink()
            recovered = time.monotonic()
            tally.first.clear()
            await eventually("it is called again", lambda: "sum-3" in tally.first)
            back = tally.first["sum-3"] - recovered
        codes = Counter(code for _, code, _ in tally.failed)
        report.append(
            f"{tally}; {dict(codes)} until it was ejected after {ejected:.2f} s; called again after {back:.2f} s"
        )
        assert set(codes) == {"INTERNAL"}
        assert ejected < 3
        assert all(when <= begun + 3 for when, *_ in tally.failed)
        assert back < 10

    asyncio.run(scenario())
