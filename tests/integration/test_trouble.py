"""It keeps answering: each test calls all the while from 16 callers, does its worst, and counts what failed."""

import asyncio
import functools
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import grpc
import grpc.aio
import pytest

import rollcall
from contracts.hello.v1.hello import HELLO
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall import context, jsonrpc
from tests.integration.fleet import CALLERS, CALLS, Call, Fleet, Tally, answered_by, eventually, holders, load

pytestmark = pytest.mark.trouble

SUMS = ("sum-1", "sum-2", "sum-3")
PEOPLE = ("person-1", "person-2", "person-3")


@asynccontextmanager
async def adding(fleet: Fleet) -> AsyncIterator[Call]:
    """Call a method that may be tried again."""
    async with rollcall.dial("sum", registry=fleet.registry) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        yield lambda: answered_by(stub.Add(sum_pb2.AddRequest(num1=333, num2=666)))


@asynccontextmanager
async def greeting(fleet: Fleet) -> AsyncIterator[Call]:
    """Call by JSON-RPC."""
    async with jsonrpc.dial(HELLO, registry=fleet.registry) as hello:

        async def call() -> str:
            assert await hello.HelloWorld("李白") == "李白 你好"
            return jsonrpc.answered_by.get()

        yield call


@asynccontextmanager
async def storing(fleet: Fleet) -> AsyncIterator[Call]:
    """Call a method that must not run twice, and that makes calls of its own; try again as its contract allows to."""
    async with rollcall.dial("student", registry=fleet.registry) as channel:
        stub = student_pb2_grpc.StudentServiceStub(channel)

        async def call() -> str:
            metadata = (("idempotency-key", uuid.uuid4().hex),)
            attempts = 5
            while True:
                attempts -= 1
                storing = stub.AddFunc(student_pb2.Student(name="李白", score=[90, 85, 77]), metadata=metadata)
                try:
                    assert (await storing).total == 252
                    return await answered_by(storing)
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE or not attempts:
                        raise

        yield call


@dataclass(frozen=True)
class Work:
    """Calls that are made, and the service whose instances get into trouble meanwhile."""

    calling: Callable[[Fleet], AbstractAsyncContextManager[Call]]
    hurt: str
    called: str
    """The service that the calls are made to: another one, when it is one further along the chain that is hurt."""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.hurt}-{n}" for n in (1, 2, 3))

    async def start(self, fleet: Fleet) -> None:
        await started(fleet, *NEEDED[self.called])


NEEDED = {
    "sum": SUMS,
    "hello": ("hello-1", "hello-2", "hello-3"),
    "student": (*SUMS, "student-1", "student-2", "student-3"),
}
WORKS = {
    "sum": Work(adding, "sum", "sum"),
    "hello": Work(greeting, "hello", "hello"),
    "student": Work(storing, "student", "student"),
    "sum behind student": Work(storing, "sum", "student"),
}
EACH_WORK = pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)


def do(channel: rollcall.Channel, traces: list[str]) -> Call:
    """Return a call of a method that must not run twice; `traces` gets what to find it by in the instances' logs."""
    stub = person_pb2_grpc.PersonServiceStub(channel)

    def call() -> Awaitable[str]:
        handled = context.incoming(None, None)
        context.current.set(handled)
        traces.append(handled.trace_id)
        return answered_by(stub.Do(person_pb2.Person(name="李白", age=333)))

    return call


@asynccontextmanager
async def everything(fleet: Fleet) -> AsyncIterator[dict[str, Tally]]:
    """Make all kinds of calls at the same time; what becomes of them, by the service that is called."""
    async with AsyncExitStack() as stack:
        for name in ("hello", "student"):
            await started(fleet, *NEEDED[name])
        tallies = {}
        for name in NEEDED:
            call = await stack.enter_async_context(WORKS[name].calling(fleet))
            tallies[name] = await stack.enter_async_context(load(call))
        yield tallies


def none_failed(report: list[str], tallies: dict[str, Tally], measured: str = "") -> None:
    report.extend(f"{name}: {tally}" for name, tally in tallies.items())
    report.extend([measured] if measured else [])
    for name, tally in tallies.items():
        assert not tally.failed, (name, tally.failed[:3])


async def called_again(fleet: Fleet, work: Work, tally: Tally, instance: str) -> None:
    """Wait until calls reach an instance, counting from now."""
    if work.hurt == work.called:
        tally.first.clear()
        await eventually("it is called again", functools.partial(tally.first.get, instance))
    else:
        before = fleet.served(instance)
        await eventually("it is called again", lambda: fleet.served(instance) > before)


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


def start(fleet: Fleet, instance: str) -> None:
    """Start an instance if it does not run yet."""
    flags = ["--database", f"sqlite:///{fleet.run}/student.db"] if instance.startswith("student") else []
    if not fleet.runs(instance):
        fleet.start(instance, *flags)


async def started(fleet: Fleet, *instances: str) -> None:
    for instance in instances:
        start(fleet, instance)
    for name, count in Counter(instance.rpartition("-")[0] for instance in instances).items():
        await fleet.pass_all(name, count)


@EACH_WORK
def test_an_instance_is_killed(fleet: Fleet, report: list[str], work: Work) -> None:
    async def scenario() -> None:
        await work.start(fleet)
        async with work.calling(fleet) as call, load(call) as tally:
            for instance in work.ids[:2]:
                await asyncio.to_thread(fleet.kill, instance)
                await fleet.pass_all(work.hurt, 2)
                fleet.start(instance)
                await fleet.pass_all(work.hurt, 3)
                await called_again(fleet, work, tally, instance)
        none_failed(report, {work.called: tally})

    asyncio.run(scenario())


@EACH_WORK
def test_a_rolling_restart(fleet: Fleet, report: list[str], work: Work) -> None:
    """SIGTERM each instance in turn and start it again."""

    async def scenario() -> None:
        await work.start(fleet)
        async with work.calling(fleet) as call, load(call) as tally:
            for instance in work.ids:
                await asyncio.to_thread(fleet.stop, instance)
                fleet.start(instance)
                await fleet.pass_all(work.hurt, 3)
        none_failed(report, {work.called: tally})

    asyncio.run(scenario())


def test_a_rolling_restart_under_calls_that_must_not_run_twice(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet, *PEOPLE)
        traces: list[str] = []
        async with rollcall.dial("person", registry=fleet.registry) as persons, load(do(persons, traces)) as tally:
            for instance in PEOPLE:
                await asyncio.to_thread(fleet.stop, instance)
                fleet.start(instance)
                await fleet.pass_all("person", 3)
        none_failed(report, {"person": tally})
        for instance in PEOPLE:
            await asyncio.to_thread(fleet.stop, instance)
        logged = "".join(fleet.log(instance) for instance in PEOPLE)
        assert Counter({trace: logged.count(trace) for trace in traces}) == Counter(traces), "run once each"

    asyncio.run(scenario())


@EACH_WORK
def test_an_instance_freezes(fleet: Fleet, report: list[str], work: Work) -> None:
    async def scenario() -> None:
        await work.start(fleet)
        async with work.calling(fleet) as call, load(call) as tally:
            fleet.signal(work.ids[1], SIGSTOP)
            await asyncio.sleep(3)  # the scenario's own measure, not a wait for anything
            fleet.signal(work.ids[1], SIGCONT)
            await fleet.pass_all(work.hurt, 3)
            await called_again(fleet, work, tally, work.ids[1])
        none_failed(report, {work.called: tally})

    asyncio.run(scenario())


def test_the_consul_leader_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with everything(fleet) as tallies:
            leader = await asyncio.to_thread(fleet.cluster.wait_for_leader)
            begun = time.monotonic()
            await asyncio.to_thread(fleet.cluster.stop_server, leader, SIGKILL)
            await eventually("another leader", lambda: fleet.cluster.leader() not in (0, leader))
            elected = time.monotonic() - begun
            for name in tallies:
                await fleet.pass_all(name, 3)
            # Discovery works on: a change is heard of with the new leader.
            await one_more_of_each_is_called(fleet, tallies)
        none_failed(report, tallies, f"a new leader after {elected:.1f} s")

    asyncio.run(scenario())


async def one_more_of_each_is_called(fleet: Fleet, tallies: dict[str, Tally]) -> None:
    for name in tallies:
        start(fleet, f"{name}-4")
    for name, tally in tallies.items():
        await eventually(f"one more of {name} is called", functools.partial(tally.first.get, f"{name}-4"), 30)


def test_the_server_of_a_registration_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with everything(fleet) as tallies:
            home = await home_of(fleet, "sum-1")
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGKILL)
            _, moved = await eventually("sum-1 is registered elsewhere", lambda: holders(fleet.cluster, "sum-1"))
            for name in tallies:
                await fleet.pass_all(name, 3)
            await asyncio.to_thread(fleet.cluster.start_server, home)
            # Every instance that it had is back on it with its data, until its owner has removed it there too.
            _, cleaned = await eventually("no ghost", lambda: listed(fleet) == sorted(SUMS) and not ghosts(fleet, home))
            await asyncio.to_thread(fleet.cluster.wait_for_leader)
            assert listed(fleet) == sorted(SUMS)
        none_failed(
            report, tallies, f"registered elsewhere after {moved:.2f} s, no ghost {cleaned:.2f} s after its return"
        )
        assert moved < 3

    asyncio.run(scenario())


def test_the_server_of_a_registration_freezes(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with everything(fleet) as tallies:
            home = await home_of(fleet, "sum-1")
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGSTOP)
            _, moved = await eventually("sum-1 is registered elsewhere", lambda: holders(fleet.cluster, "sum-1"))
            await one_more_of_each_is_called(fleet, tallies)
            await asyncio.to_thread(fleet.cluster.stop_server, home, SIGCONT)
            for name in tallies:
                await fleet.pass_all(name, 4)
        none_failed(report, tallies, f"registered elsewhere after {moved:.2f} s")

    asyncio.run(scenario())


def test_an_instance_is_killed_under_calls_that_must_not_run_twice(fleet: Fleet, report: list[str]) -> None:
    """Those that were with it are lost, and reported so; none is run again elsewhere."""

    async def scenario() -> None:
        await started(fleet, *PEOPLE)
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
        logged = "".join(fleet.log(instance) for instance in PEOPLE)
        assert max(logged.count(trace) for trace in traces) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("data", ["kept", "lost"])
def test_all_of_consul_is_away(fleet: Fleet, report: list[str], data: str) -> None:
    async def scenario() -> None:
        cluster = fleet.cluster
        async with everything(fleet) as tallies:
            await asyncio.gather(*(asyncio.to_thread(cluster.stop_server, n, SIGKILL) for n in (1, 2, 3)))
            away = time.monotonic()
            if data == "lost":
                for n in (1, 2, 3):
                    cluster.wipe_data(n)
            before = {name: tally.answered.total() for name, tally in tallies.items()}
            await asyncio.sleep(20)  # the scenario's own measure
            during = {name: tally.answered.total() - before[name] for name, tally in tallies.items()}
            await asyncio.to_thread(cluster.start)
            returned = time.monotonic()
            for name in tallies:
                await fleet.pass_all(name, 3)
            whole = time.monotonic() - returned
            # Long enough for what the callers hold on to without Consul to have been given up.
            await eventually("the grace is over", lambda: time.monotonic() - returned > 16, 20)
            assert fleet.passing("sum") == set(SUMS)
        none_failed(
            report,
            tallies,
            f"away for {returned - away:.0f} s, {sum(during.values()):,} calls meanwhile; registrations whole "
            f"{whole:.2f} s after its return",
        )
        assert min(during.values()) > CALLS / 2
        assert whole < 8  # hello is checked each 5 s

    asyncio.run(scenario())


@pytest.mark.parametrize("name", NEEDED)
def test_an_instance_is_added(fleet: Fleet, report: list[str], name: str) -> None:
    async def scenario() -> None:
        work, added = WORKS[name], f"{name}-4"
        await work.start(fleet)
        async with work.calling(fleet) as call, load(call) as tally:
            start(fleet, added)
            await eventually("it is ready", lambda: "is registered" in fleet.log(added), 60)
            ready = time.monotonic()
            await eventually("it is called", lambda: added in tally.first)
        took = max(0.0, tally.first[added] - ready)
        none_failed(report, {name: tally}, f"called {1000 * took:.0f} ms after it was seen to be ready")
        assert took < 1

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["sum", "hello", "sum behind student"])
def test_an_instance_only_fails(fleet: Fleet, report: list[str], tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        work = WORKS[name]
        broken = tmp_path / "broken"
        fleet.environment["BROKEN"] = str(broken)
        fleet.start(work.ids[2], module=f"tests.integration.failing_{work.hurt}")
        await work.start(fleet)
        async with work.calling(fleet) as call, load(call) as tally:
            await called_again(fleet, work, tally, work.ids[2])
            broken.touch()
            begun = time.monotonic()
            await eventually("a failure", lambda: tally.failed)
            # Failures stop when none has come for a second, at hundreds of calls a second to each instance.
            await eventually("failures stop", lambda: time.monotonic() - tally.failed[-1][0] > 1, 5)
            ejected = tally.failed[-1][0] - begun
            broken.unlink()
            recovered = time.monotonic()
            await called_again(fleet, work, tally, work.ids[2])
            back = time.monotonic() - recovered
        codes = Counter(code for _, code, _ in tally.failed)
        report.append(
            f"{tally}; {dict(codes)} until it was ejected after {ejected:.2f} s; called again after {back:.2f} s"
        )
        assert set(codes) == {"RemoteError" if name == "hello" else "INTERNAL"}
        assert ejected < 3
        assert all(when <= begun + 3 for when, *_ in tally.failed)
        assert back < 10

    asyncio.run(scenario())
