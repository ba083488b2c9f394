"""greeter's streams, as its callers and its instances see them: held back, cancelled, drained, broken."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from deploy.local.guard import Guard
from rollcall import channel
from tests.integration.fleet import CALLERS, ROOT, Fleet, Tally, eventually

GREETERS = ("greeter-1", "greeter-2", "greeter-3")
KINDS = ("ClientStream", "ServerStream", "BidiStream")
ENDLESS = 10_000_000  # messages: more than any test reads
MB = 1_000_000
NOISE = 5 * MB  # what the memory of a process may grow by for whatever reason
SMALL_WINDOW = 15_000  # messages: more than fit into a window of 64 kB and the buffers on the way
LARGE_WINDOW = 8 * MB  # bytes: twice the size that gRPC's windows grow to while there is memory enough
PADDING = 1000  # bytes
UNKNOWN = b"\x7a\xe8\x07" + bytes(PADDING)  # field 15, of so many bytes, on the wire


def metric(fleet: Fleet, instance: str, name: str, **labels: str) -> float:
    """Return a metric of an instance, summed over all labels but the given."""
    port = re.findall(r"probes at port (\d+)", fleet.log(instance))[-1]
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def handled(fleet: Fleet, instance: str, method: str) -> dict[str, float]:
    """Return how many streams of a kind an instance has ended, by their status."""
    codes = (code.name for code in grpc.StatusCode)
    counts = {
        code: metric(fleet, instance, "grpc_server_handled_total", grpc_method=method, grpc_code=code) for code in codes
    }
    return {code: count for code, count in counts.items() if count}


def memory(fleet: Fleet, instance: str) -> int:
    """Return the bytes that an instance has resident."""
    return int(psutil.Process(fleet.process(instance).pid).memory_info().rss)


async def standing_still(count: Callable[[], float]) -> float:
    """Wait until a count has not grown for a second, and return it."""
    deadline = time.monotonic() + 20
    before, now = -1.0, await asyncio.to_thread(count)
    while now != before:
        assert time.monotonic() < deadline, f"it still grows: {now:,.0f}"
        await asyncio.sleep(1)  # the measure of standing still
        before, now = now, await asyncio.to_thread(count)
    return now


@contextlib.asynccontextmanager
async def one_greeter(
    fleet: Fleet, *flags: str, **settings: Any
) -> AsyncIterator["greeter_pb2_grpc.GreeterServiceAsyncStub"]:
    """Start greeter-1 and yield a stub that calls it."""
    fleet.start("greeter-1", *flags)
    await fleet.pass_all("greeter", 1)
    async with rollcall.dial("greeter", registry=fleet.registry, **settings) as dialled:
        stub = greeter_pb2_grpc.GreeterServiceStub(dialled)
        await stub.Call(greeter_pb2.CallRequest())  # has a deadline, and so waits for a connection; streams do not
        yield stub


async def begun(fleet: Fleet, stub: Any, kind: str, count: int = ENDLESS, **arguments: Any) -> Any:
    """Return a stream of a kind that is under way at greeter-1, and ends when its caller ends it, or after `count`."""
    if kind == "ServerStream":
        stream = stub.ServerStream(greeter_pb2.ServerStreamRequest(count=count), **arguments)
        assert (await stream.read()).count == 0
    elif kind == "ClientStream":
        stream = stub.ClientStream(**arguments)
        await stream.write(greeter_pb2.ClientStreamRequest(stroke=0))
    else:
        stream = stub.BidiStream(**arguments)
        await stream.write(greeter_pb2.BidiStreamRequest(stroke=0))
        assert (await stream.read()).stroke == 0
    await eventually("it is handled", lambda: metric(fleet, "greeter-1", "grpc_server_in_flight") == 1)
    return stream


async def rest(stream: Any, kind: str) -> Any:
    """Wait for the end of a stream and return the last of its answers; raises what it ends with."""
    if kind == "ClientStream":
        return await stream
    answer = None
    while (message := await stream.read()) is not grpc.aio.EOF:
        answer = message
    return answer


# Flow control


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that stay as they are at first, for channels dialled here: 4 MB are a minute's worth of tiny messages."""
    monkeypatch.setattr(channel, "OPTIONS", (*channel.OPTIONS, ("grpc.http2.bdp_probe", 0)))


@pytest.mark.usefixtures("small_windows")
def test_a_reader_that_stalls_holds_the_instance_back(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with one_greeter(fleet) as stub:
            before = memory(fleet, "greeter-1")
            stream = await begun(fleet, stub, "ServerStream")
            sent = await standing_still(lambda: metric(fleet, "greeter-1", "grpc_server_msg_sent_total"))
            grown = memory(fleet, "greeter-1") - before
            report.append(f"held back after {sent:,.0f} messages, resident memory grown by {grown / MB:.1f} MB")
            assert sent < SMALL_WINDOW
            assert grown < NOISE
            for count in range(1, int(sent) + 1000):  # nothing was lost meanwhile, and it goes on
                assert (await stream.read()).count == count
            stream.cancel()

    asyncio.run(scenario())


def padded(stroke: int) -> greeter_pb2.BidiStreamRequest:
    """Return a stroke with a field that greeter does not know, as a newer caller may send: few of them make 4 MB."""
    unknown = greeter_pb2.BidiStreamRequest.FromString(UNKNOWN)
    unknown.stroke = stroke
    return unknown


def test_an_instance_that_stalls_holds_the_writer_back(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with one_greeter(fleet) as stub:
            stream = await begun(fleet, stub, "BidiStream")
            fleet.signal("greeter-1", SIGSTOP)
            before = psutil.Process().memory_info().rss
            written = 0

            async def write() -> None:
                nonlocal written
                for stroke in range(1, ENDLESS):
                    await stream.write(padded(stroke))
                    written = stroke

            writer = asyncio.create_task(write())
            held = int(await standing_still(lambda: written))
            grown = psutil.Process().memory_info().rss - before
            report.append(f"held back after {held:,} messages, resident memory grown by {grown / MB:.1f} MB")
            assert held < LARGE_WINDOW / PADDING
            assert grown < NOISE
            fleet.signal("greeter-1", SIGCONT)
            for stroke in range(1, held + 1000):  # nothing was lost meanwhile, and it goes on
                assert (await stream.read()).stroke == stroke
            writer.cancel()
            stream.cancel()

    asyncio.run(scenario())


@pytest.mark.timeout(900)  # a message costs either side a tenth of a millisecond of CPU
def test_memory_stays_flat_over_a_million_messages(fleet: Fleet, guard: Guard, report: list[str]) -> None:
    count = 1_000_000

    async def scenario() -> None:
        fleet.start("greeter-1")
        await fleet.pass_all("greeter", 1)
        reader = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.reader", str(count)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=fleet.environment,
            start_new_session=True,  # the guard ends whole groups
        )
        guard.watch(reader.pid)
        assert reader.stdin
        assert reader.stdout
        resident = []
        started = time.monotonic()
        for tenth in range(1, 11):
            assert int(await reader.stdout.readline()) == tenth * count // 10
            resident.append((memory(fleet, "greeter-1"), psutil.Process(reader.pid).memory_info().rss))
        took = time.monotonic() - started
        reader.stdin.close()
        assert await reader.wait() == 0
        assert metric(fleet, "greeter-1", "grpc_server_msg_sent_total", grpc_method="ServerStream") == count
        (instance_begin, reader_begin), *_, (instance_end, reader_end) = resident
        report.append(
            f"resident memory after 100,000 and 1,000,000 messages: instance {instance_begin / MB:.1f} and "
            f"{instance_end / MB:.1f} MB, caller {reader_begin / MB:.1f} and {reader_end / MB:.1f} MB; {took:.0f} s"
        )
        assert instance_end - instance_begin < NOISE
        assert reader_end - reader_begin < NOISE

    asyncio.run(scenario())


# Cancellation and deadlines


async def ended_as(fleet: Fleet, kind: str) -> str:
    """Wait until the instance counts no stream as being handled, and return how it counts the one that was."""
    await eventually("no stream is handled", lambda: metric(fleet, "greeter-1", "grpc_server_in_flight") == 0)
    ((code, count),) = handled(fleet, "greeter-1", kind).items()
    assert count == 1
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_stream_ends_at_both_ends(fleet: Fleet, kind: str) -> None:
    async def scenario() -> None:
        async with one_greeter(fleet) as stub:
            stream = await begun(fleet, stub, kind)
            stream.cancel()
            with pytest.raises(asyncio.CancelledError):
                await rest(stream, kind)
            assert await stream.code() == grpc.StatusCode.CANCELLED
            assert await ended_as(fleet, kind) == "CANCELLED"

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_ends_a_stream_at_both_ends(fleet: Fleet, kind: str) -> None:
    async def scenario() -> None:
        async with one_greeter(fleet) as stub:
            stream = await begun(fleet, stub, kind, timeout=3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream, kind)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            # The caller's clock started a moment earlier: it may have told the instance before the instance knew.
            assert await ended_as(fleet, kind) in ("DEADLINE_EXCEEDED", "CANCELLED")

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_whose_instance_dies_is_reported(fleet: Fleet, kind: str) -> None:
    async def scenario() -> None:
        # A stream that has not been answered yet would be made again, and wait for another instance until its deadline.
        async with one_greeter(fleet, retries=0) as stub:
            stream = await begun(fleet, stub, kind, timeout=30)
            await asyncio.to_thread(fleet.kill, "greeter-1")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream, kind)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


# Draining

DRAIN, GRACE = 0.5, 4.0
FLAGS = ("--drain", str(DRAIN), "--grace", str(GRACE))


async def draining(fleet: Fleet) -> float:
    """Ask greeter-1 to stop and wait until it has deregistered; return when it was asked."""
    asked = time.monotonic()
    fleet.signal("greeter-1", SIGTERM)
    await eventually("it is gone from the list", lambda: not fleet.passing("greeter"))
    return asked


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", KINDS)
def test_a_drain_lets_a_stream_finish(fleet: Fleet, kind: str) -> None:
    async def scenario() -> None:
        async with one_greeter(fleet, "--drain", str(DRAIN), "--grace", "60") as stub:
            stream = await begun(fleet, stub, kind, count=SMALL_WINDOW)
            await draining(fleet)
            await eventually("the grace begins", lambda: "takes no more calls" in fleet.log("greeter-1"))
            assert metric(fleet, "greeter-1", "grpc_server_in_flight") == 1
            if kind == "ServerStream":
                assert (await rest(stream, kind)).count == SMALL_WINDOW - 1
            elif kind == "ClientStream":
                await stream.write(greeter_pb2.ClientStreamRequest(stroke=1))
                await stream.done_writing()
                assert (await rest(stream, kind)).count == 2
            else:
                await stream.write(greeter_pb2.BidiStreamRequest(stroke=1))
                await stream.done_writing()
                assert (await rest(stream, kind)).stroke == 1
            assert await stream.code() == grpc.StatusCode.OK
            assert await asyncio.to_thread(fleet.process("greeter-1").wait, 10)
            assert "has ended" in fleet.log("greeter-1")

    asyncio.run(scenario())


@pytest.mark.usefixtures("small_windows")  # else megabytes may be before that status, and are cut off with it
@pytest.mark.parametrize("kind", KINDS)
def test_a_drain_ends_a_stream_that_takes_too_long_and_sends_its_caller_elsewhere(fleet: Fleet, kind: str) -> None:
    async def scenario() -> None:
        # A stream that has not been answered yet would be made again, and wait for another instance until its deadline.
        async with one_greeter(fleet, *FLAGS, retries=0) as stub:
            stream = await begun(fleet, stub, kind, timeout=30)
            asked = await draining(fleet)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream, kind)
            assert time.monotonic() - asked > DRAIN + GRACE
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "greeter-1 is going" in (caught.value.details() or "")
            assert await asyncio.to_thread(fleet.process("greeter-1").wait, 10)
            assert "has ended" in fleet.log("greeter-1")

    asyncio.run(scenario())


def test_a_drain_does_not_wait_for_a_stalled_reader(fleet: Fleet) -> None:
    """What the reader has not read when the instance is gone is lost to it, and it learns so."""

    async def scenario() -> None:
        async with one_greeter(fleet, *FLAGS) as stub:
            stream = await begun(fleet, stub, "ServerStream")
            asked = await draining(fleet)
            assert await asyncio.to_thread(fleet.process("greeter-1").wait, 10)
            assert time.monotonic() - asked < DRAIN + GRACE + 3
            assert "has ended" in fleet.log("greeter-1")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream, "ServerStream")
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_a_drain_moves_a_client_stream_to_another_instance(fleet: Fleet) -> None:
    """Its method may run more than once, so gRPC writes what was written so far to another instance."""

    async def scenario() -> None:
        async with one_greeter(fleet, *FLAGS) as stub:
            stream = await begun(fleet, stub, "ClientStream", timeout=30)
            fleet.start("greeter-2")
            await fleet.pass_all("greeter", 2)
            await asyncio.to_thread(fleet.stop, "greeter-1")
            await stream.write(greeter_pb2.ClientStreamRequest(stroke=1))
            await stream.done_writing()
            assert (await stream).count == 2
            assert dict(await stream.trailing_metadata())["rollcall-instance"] == "greeter-2"

    asyncio.run(scenario())


# Trouble: 16 callers open streams of every kind all the while, and each is of known length.

STROKES = 50
PAUSE = 0.005  # seconds between two strokes, so that a stream lasts about a third of a second
COUNT = 12_000  # messages, which fill a small window
CHUNK = 2000  # messages read between two pauses
STREAMS = 100
DEADLINE = (
    15  # seconds, of client streams: as long as the longest trouble here and the stream itself, on a busy machine
)


@dataclass
class Streams(Tally):
    """What the callers saw of their streams."""

    wrong: list[str] = field(default_factory=list)
    """Streams that ended with OK, but without all that belongs to them."""

    def __str__(self) -> str:
        return super().__str__().replace("calls", "streams")


async def client_stream(stub: Any) -> tuple[Any, int, int]:
    """Make a whole stream; return its call, how many messages came of it and how many should have."""

    async def strokes() -> AsyncIterator[greeter_pb2.ClientStreamRequest]:
        for stroke in range(STROKES):
            await asyncio.sleep(PAUSE)
            yield greeter_pb2.ClientStreamRequest(stroke=stroke)

    stream = stub.ClientStream(strokes())
    return stream, (await stream).count, STROKES


async def server_stream(stub: Any) -> tuple[Any, int, int]:
    """See client_stream."""
    stream = stub.ServerStream(greeter_pb2.ServerStreamRequest(count=COUNT))
    read = 0
    async for message in stream:
        read += message.count == read
        if read % CHUNK == 0:
            await asyncio.sleep(PAUSE)
    return stream, read, COUNT


async def bidi_stream(stub: Any) -> tuple[Any, int, int]:
    """See client_stream."""

    async def strokes() -> AsyncIterator[greeter_pb2.BidiStreamRequest]:
        for stroke in range(STROKES):
            await asyncio.sleep(PAUSE)
            yield greeter_pb2.BidiStreamRequest(stroke=stroke)

    stream = stub.BidiStream(strokes())
    answered = 0
    async for answer in stream:
        answered += answer.stroke == answered
    return stream, answered, STROKES


MAKERS: tuple[Callable[[Any], Awaitable[tuple[Any, int, int]]], ...] = (
    # A server stream costs as much as dozens of the others: two callers of sixteen make them.
    *(client_stream, bidi_stream) * (CALLERS // 2 - 1),
    *(server_stream, server_stream),
)


@contextlib.asynccontextmanager
async def streaming(fleet: Fleet, report: list[str], *, lost: int = 0) -> AsyncIterator[Streams]:
    """Start three instances, and open streams from before the block until there were enough.

    None may have been short then, and no more than `lost` have failed.
    """
    for instance in GREETERS:
        fleet.start(instance)
    await fleet.pass_all("greeter", 3)
    tally, over = Streams(), asyncio.Event()

    async def caller(make: Callable[[Any], Awaitable[tuple[Any, int, int]]], stub: Any) -> None:
        while not over.is_set() or tally.answered.total() < STREAMS:
            begun = time.monotonic()
            try:
                stream, came, expected = await make(stub)
                instance = dict(await stream.trailing_metadata())["rollcall-instance"]
                tally.answered[instance] += 1
                tally.first.setdefault(instance, time.monotonic())
                if came != expected or await stream.code() != grpc.StatusCode.OK:
                    tally.wrong.append(f"{make.__name__} at {instance}: {came} of {expected}, {await stream.code()}")
            except grpc.aio.AioRpcError as error:
                tally.failed.append((time.monotonic(), error.code().name, f"{make.__name__}: {error.details()}"))
            tally.slowest = max(tally.slowest, time.monotonic() - begun)

    async with (
        rollcall.dial("greeter", registry=fleet.registry, deadline=DEADLINE) as dialled,
        asyncio.TaskGroup() as group,
    ):
        stub = greeter_pb2_grpc.GreeterServiceStub(dialled)
        await stub.Call(greeter_pb2.CallRequest())
        for make in MAKERS:
            group.create_task(caller(make, stub))
        try:
            await eventually("every instance is called", lambda: len(tally.answered) == 3, 30)
            yield tally
        finally:
            over.set()
    report.append(str(tally))
    assert not tally.wrong
    assert len(tally.failed) <= lost, tally.failed[:3]


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_while_an_instance_is_killed(fleet: Fleet, report: list[str]) -> None:
    """Those that were with it are lost, and reported so."""

    async def scenario() -> None:
        async with streaming(fleet, report, lost=CALLERS) as tally:
            await asyncio.to_thread(fleet.kill, "greeter-2")
            await fleet.pass_all("greeter", 2)
            fleet.start("greeter-2")
            tally.first.clear()
            await eventually("it is called again", lambda: "greeter-2" in tally.first, 20)
        # INTERNAL is what grpc.aio says when it was writing and has not heard of the stream's status yet.
        assert {code for _, code, _ in tally.failed} <= {"UNAVAILABLE", "INTERNAL"}, tally.failed[:3]

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_over_a_rolling_restart(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with streaming(fleet, report):
            for instance in GREETERS:
                await asyncio.to_thread(fleet.stop, instance)
                fleet.start(instance)
                await fleet.pass_all("greeter", 3)

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_while_an_instance_freezes(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with streaming(fleet, report) as tally:
            fleet.signal("greeter-2", SIGSTOP)
            await asyncio.sleep(3)  # the scenario's own measure, not a wait for anything
            fleet.signal("greeter-2", SIGCONT)
            await fleet.pass_all("greeter", 3)
            tally.first.clear()
            await eventually("it is called again", lambda: "greeter-2" in tally.first, 20)

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_while_the_consul_leader_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with streaming(fleet, report):
            leader = await asyncio.to_thread(fleet.cluster.wait_for_leader)
            await asyncio.to_thread(fleet.cluster.stop_server, leader, SIGKILL)
            await eventually("another leader", lambda: fleet.cluster.leader() not in (0, leader))
            await fleet.pass_all("greeter", 3)

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_while_all_of_consul_is_away(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        cluster = fleet.cluster
        async with streaming(fleet, report) as tally:
            await asyncio.gather(*(asyncio.to_thread(cluster.stop_server, n, SIGKILL) for n in (1, 2, 3)))
            before = tally.answered.total()
            await asyncio.sleep(10)  # the scenario's own measure
            during = tally.answered.total() - before
            await asyncio.to_thread(cluster.start)
            await fleet.pass_all("greeter", 3)
        report.append(f"{during} streams meanwhile")
        assert during > STREAMS

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("small_windows")
def test_streams_while_an_instance_is_added(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        async with streaming(fleet, report) as tally:
            fleet.start("greeter-4")
            await eventually("a stream ends there", lambda: "greeter-4" in tally.first, 20)

    asyncio.run(scenario())
