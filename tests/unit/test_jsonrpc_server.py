"""The server and its own client over real sockets, on both event loops: order, errors, limits, draining."""

import asyncio
import contextlib
import json
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest
import uvloop

from rollcall import context, jsonrpc
from rollcall.telemetry import Telemetry
from tests.waiting import free_port

SECONDS = 20


class Trial(Protocol):
    async def Echo(self, text: str, /) -> str: ...

    async def Double(self, text: str, /) -> str: ...

    async def Wait(self, name: str, /) -> str: ...

    async def Refuse(self, text: str, /) -> str: ...

    async def Halve(self, text: str, /) -> str: ...

    async def Fail(self, text: str, /) -> str: ...

    async def Cancel(self, text: str, /) -> str: ...

    async def Lie(self, text: str, /) -> str: ...

    async def Nest(self, levels: int, /) -> list[Any]: ...

    async def Trace(self, text: str, /) -> str: ...


TRIAL = jsonrpc.Contract("trial", Trial)


class Handler:
    """Does all that a handler may do to a server."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    async def Echo(self, text: str) -> str:
        return text

    async def Double(self, text: str) -> str:
        return 2 * text

    async def Wait(self, name: str) -> str:
        """Answer when the test says so."""
        try:
            await self.waiting.setdefault(name, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        return name

    async def Refuse(self, text: str) -> str:
        raise jsonrpc.RefusedError(text)

    async def Halve(self, text: str) -> str:  # noqa: ARG002
        raise jsonrpc.RefusedError("half: \ud800")

    async def Fail(self, text: str) -> str:
        raise RuntimeError(text)

    async def Cancel(self, text: str) -> str:
        """Wait for something that somebody else cancels."""
        background = asyncio.create_task(self.Echo(text))
        background.cancel()
        return await background

    async def Lie(self, text: str) -> str:
        return len(text)  # type: ignore[return-value]

    async def Nest(self, levels: int) -> list[Any]:
        nested: list[Any] = []
        for _ in range(levels - 1):
            nested = [nested]
        return nested

    async def Trace(self, text: str) -> str:  # noqa: ARG002
        call = context.current.get()
        return call.trace_id if call else ""


class Served:
    def __init__(self, handler: Handler, server: jsonrpc.Server) -> None:
        self.handler, self.server = handler, server
        self.address = f"127.0.0.1:{server.port}"

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    async def waits(self, *names: str) -> None:
        """Wait until calls of these names wait."""
        await until(lambda: set(names) <= set(self.handler.waiting))


@asynccontextmanager
async def served(limits: jsonrpc.Limits | None = None, telemetry: Telemetry | None = None) -> AsyncIterator[Served]:
    server, handler = jsonrpc.Server(limits or jsonrpc.Limits()), Handler()
    server.register(TRIAL, handler)
    await server.listen("127.0.0.1", 0)
    if telemetry:
        server.equip(telemetry)
    await server.start()
    try:
        yield Served(handler, server)
    finally:
        await server.stop(0)


async def until(met: Callable[[], Any]) -> None:
    while not met():  # noqa: ASYNC110 (a condition of many parts)
        await asyncio.sleep(0.001)


def request(method: str, argument: Any, number: Any = 1) -> bytes:
    return json.dumps({"method": f"trial.{method}", "params": [argument], "id": number}).encode()


Scenario = Callable[[], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(scenario: Scenario) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SECONDS):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(bounded())

    return run


@pytest.mark.parametrize("number", [0, "a", None, 1.5, True, [1, {"a": None}], {"a": ["b"]}, 10**40])
def test_an_id_comes_back_as_it_was(run: Run, number: Any) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Echo", "x", number))
            assert json.loads(await reader.readline()) == {"id": number, "result": "x", "error": None}
            writer.close()

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ({"method": "trial.Echo", "params": [], "id": 1}, "trial.Echo: expected params as an array of one str"),
        ({"method": "trial.Echo", "params": {}, "id": 1}, "trial.Echo: expected params as an array of one str"),
        ({"method": "trial.Echo", "params": None, "id": 1}, "jsonrpc: request body missing params"),
        ({"method": "trial.Echo", "id": 1}, "jsonrpc: request body missing params"),
        ({"method": "trial.Echo", "params": [1], "id": 1}, "trial.Echo: expected str, found a number"),
        ({"method": "trial.echo", "params": ["x"], "id": 1}, "rpc: can't find method trial.echo"),
        ({"method": "a.b.Echo", "params": ["x"], "id": 1}, "rpc: can't find service a.b.Echo"),
        ({"method": "Echo", "params": ["x"], "id": 1}, "rpc: service/method request ill-formed: Echo"),
        ({"id": 1}, "rpc: service/method request ill-formed: "),
        (
            {"method": 5, "id": 1},
            "rpc: server cannot decode request: expected a string as method, found something else",
        ),
        ({"method": "x." + "y" * 9999, "id": 1}, "rpc: can't find service x." + "y" * 198 + "..."),
        ({"method": "trial.Refuse", "params": ["no"], "id": 1}, "no"),
        ({"method": "trial.Refuse", "params": [""], "id": 1}, ""),
    ],
)
def test_a_call_that_cannot_be_answered(run: Run, sent: dict[str, Any], error: str) -> None:
    """It gets an error, and the next call is answered."""

    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(json.dumps(sent).encode())
            assert json.loads(await reader.readline()) == {"id": 1, "result": None, "error": error}
            writer.write(b'{"more":[],"id":2,"params":["x",{}],"method":"trial.Echo"}')  # of which Go takes no notice
            assert await reader.readline() == b'{"id":2,"result":"x","error":null}\n'
            writer.close()

    run(scenario)


def test_calls_before_what_is_no_json_are_answered(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Wait", "a", 1) + request("Echo", "x", 2) + b"no JSON" + request("Echo", "x", 3))
            said = [json.loads(await reader.readline()) for _ in range(2)]
            assert {each["id"] for each in said} == {2, None}
            await trial.waits("a")
            trial.handler.waiting["a"].set()
            assert await reader.read() == b'{"id":1,"result":"a","error":null}\n'  # and then it is closed
            writer.close()

    run(scenario)


def test_replies_come_in_the_order_in_which_calls_end(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Wait", "a", 1) + request("Wait", "b", 2) + request("Echo", "c", 3))
            await trial.waits("a", "b")
            trial.handler.waiting["b"].set()
            assert [json.loads(await reader.readline())["id"] for _ in range(2)] == [3, 2]
            trial.handler.waiting["a"].set()
            assert json.loads(await reader.readline())["id"] == 1
            writer.close()

    run(scenario)


def test_a_client_that_has_sent_all_still_gets_its_replies(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Wait", "a"))
            writer.write_eof()
            await trial.waits("a")
            trial.handler.waiting["a"].set()
            assert await reader.read() == b'{"id":1,"result":"a","error":null}\n'
            writer.close()
            await until(lambda: not trial.server.connections)

    run(scenario)


def test_no_more_calls_than_allowed_are_in_flight(run: Run) -> None:
    """The others wait unread, and are answered in the end, whether the client has ended its side or not."""

    async def scenario() -> None:
        async with served(jsonrpc.Limits(calls=3)) as trial:
            reader, writer = await trial.open()
            names = [str(number) for number in range(50)]
            writer.write(b"".join(request("Wait", name, int(name)) for name in names))
            writer.write_eof()
            for first in range(50):
                await trial.waits(names[first])
                assert len(trial.handler.waiting) <= first + 3
                trial.handler.waiting[names[first]].set()
            said = [json.loads(line)["id"] for line in (await reader.read()).splitlines()]
            assert sorted(said) == list(range(50))
            writer.close()

    run(scenario)


def test_a_handler_that_fails(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with served() as trial, jsonrpc.connect(trial.address, TRIAL) as client:
            with pytest.raises(jsonrpc.RemoteError) as caught:
                await client.Fail("secret")
            trace = str(caught.value).removeprefix("trial.Fail failed; the log has it under trace ")
            (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
            assert getattr(record, "call", None) == {"trace": trace}
            assert "RuntimeError: secret" in caplog.text
            for call in (client.Lie, client.Cancel):
                caplog.clear()
                with pytest.raises(jsonrpc.RemoteError, match=r"^trial\.(Lie|Cancel) failed; the log has it"):
                    await call("x")
                assert [each.levelno for each in caplog.records].count(logging.ERROR) == 1
            assert await client.Echo("x") == "x"

    run(scenario)


def test_a_handler_may_say_what_no_utf8_can(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Halve", "x"))
            assert json.loads(await reader.readline())["error"] == "half: ?"
            writer.close()

    run(scenario)


def test_what_is_beyond_the_limits_is_refused_before_it_is_sent(run: Run) -> None:
    """By either side: else the other would have to close the connection, with the calls of others on it."""

    async def scenario() -> None:
        limits = jsonrpc.Limits(message=10_000)
        async with served(limits) as trial, jsonrpc.connect(trial.address, TRIAL, limits=limits) as client:
            with pytest.raises(jsonrpc.JsonRpcError, match=r"cannot be called with a request of \d+ bytes, of which"):
                await client.Echo("x" * 10_000)
            with pytest.raises(
                jsonrpc.RemoteError, match=r"^trial\.Double has a reply of 120\d\d bytes, of which 10000"
            ):
                await client.Double("x" * 6_000)
            assert await client.Nest(31) == await Handler().Nest(31)
            with pytest.raises(
                jsonrpc.RemoteError, match=r"^trial\.Nest has a reply of more than 32 levels of nesting$"
            ):
                await client.Nest(32)
            with pytest.raises(jsonrpc.RemoteError, match=r"^x{200}\.\.\.$"):
                await client.Refuse("x" * 9_000)
            assert await client.Echo("x") == "x"

    run(scenario)


def test_a_call_is_handled_in_a_trace_of_its_own(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial, jsonrpc.connect(trial.address, TRIAL) as client:
            traces = {await client.Trace("") for _ in range(10)}
            assert len(traces) == 10
            assert all(len(trace) == 32 for trace in traces)

    run(scenario)


def test_calls_are_counted_by_how_they_end(run: Run) -> None:
    async def scenario() -> None:
        telemetry = Telemetry("trial", "trial-1", "")
        async with served(telemetry=telemetry) as trial:
            async with jsonrpc.connect(trial.address, TRIAL) as client:
                await client.Echo("x")
                for call in (client.Refuse, client.Fail):
                    with pytest.raises(jsonrpc.RemoteError):
                        await call("x")
            _, writer = await trial.open()
            writer.write(request("Wait", "a"))
            await trial.waits("a")
            # A client that has gone for good; one that only closes could still be there to read.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            await until(lambda: trial.handler.cancelled)

        def handled(method: str, code: str) -> float | None:
            labels = {"jsonrpc_service": "trial", "jsonrpc_method": method, "jsonrpc_code": code}
            return telemetry.metrics.get_sample_value("jsonrpc_server_handled_total", labels)

        assert handled("Echo", "OK") == 1
        assert handled("Refuse", "ERROR") == 1
        assert handled("Fail", "INTERNAL") == 1
        assert handled("Wait", "CANCELLED") == 1
        in_flight = {"jsonrpc_service": "trial", "jsonrpc_method": "Wait"}
        assert telemetry.metrics.get_sample_value("jsonrpc_server_in_flight", in_flight) == 0

    run(scenario)


def test_stopping_finishes_what_is_in_flight_and_refuses_the_rest(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            idle, _ = await trial.open()
            writer.write(request("Wait", "a", 1))
            await trial.waits("a")
            stopping = asyncio.create_task(trial.server.stop(SECONDS))
            assert await idle.read() == b""  # closed at once
            writer.write(request("Echo", "x", 2))
            refused = json.loads(await reader.readline())
            assert refused == {"id": 2, "result": None, "error": "rpc: trial is going; call again elsewhere"}
            with pytest.raises(OSError):  # noqa: PT011 (whichever way the system says it)
                await trial.open()
            trial.handler.waiting["a"].set()
            assert await reader.read() == b'{"id":1,"result":"a","error":null}\n'
            await stopping
            writer.close()

    run(scenario)


def test_stopping_ends_what_outlives_the_grace(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.write(request("Wait", "a", 1))
            await trial.waits("a")
            begun = time.monotonic()
            await trial.server.stop(0.2)
            assert 0.19 <= time.monotonic() - begun < 1, "uvloop counts in whole milliseconds"
            says = "trial.Wait could not be finished, the instance is going: it may have run; call again"
            assert json.loads(await reader.read()) == {"id": 1, "result": None, "error": says}
            assert trial.handler.cancelled == ["a"]
            writer.close()

    run(scenario)


@pytest.mark.parametrize("run", [uvloop.new_event_loop], indirect=True, ids=["uvloop"])
def test_stopping_also_closes_what_is_being_accepted(run: Run) -> None:
    """Not so with asyncio's own loop, which may itself forget a connection that it accepts as its server closes."""

    async def scenario() -> None:
        for turns in range(8):  # of the event loop, of which accepting takes some
            async with served() as trial:
                with socket.create_connection(("127.0.0.1", trial.server.port)) as peer:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await trial.server.stop(SECONDS)
                    peer.settimeout(SECONDS / 4)
                    with contextlib.suppress(ConnectionResetError):  # it was not accepted at all
                        assert await asyncio.to_thread(peer.recv, 1) == b""

    run(scenario)


def test_stopping_does_not_wait_for_a_peer_that_does_not_read(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial:
            reader, writer = await trial.open()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            large = request("Echo", "x" * 500_000)
            for _ in range(40):
                writer.write(large)
            (connection,) = trial.server.connections
            await until(lambda: connection._held_back)
            begun = time.monotonic()
            await trial.server.stop(0.1)
            assert time.monotonic() - begun < 3
            writer.transport.abort()
            del reader

    run(scenario)


# The client.


def test_a_client_without_a_server(run: Run) -> None:
    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        with pytest.raises(jsonrpc.UnavailableError, match=f"^no connection to {address}: "):
            async with jsonrpc.connect(address, TRIAL):
                pass
        with pytest.raises(jsonrpc.UnavailableError, match=r"^no connection to nonsense: "):
            async with jsonrpc.connect("nonsense", TRIAL):
                pass

    run(scenario)


def test_a_connection_that_breaks_fails_its_calls(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial, jsonrpc.connect(trial.address, TRIAL) as client:
            calls = [asyncio.create_task(client.Wait(name)) for name in "ab"]
            await trial.waits("a", "b")
            for connection in tuple(trial.server.connections):
                connection.abort()
            for call in calls:
                with pytest.raises(jsonrpc.UnavailableError) as caught:
                    await call
                assert caught.value.may_have_run
            with pytest.raises(jsonrpc.UnavailableError) as caught:
                await client.Echo("x")
            assert not caught.value.may_have_run

    run(scenario)


@pytest.mark.parametrize(
    ("reply", "error", "says"),
    [
        (b"no JSON", jsonrpc.UnavailableError, "has sent what is no reply: expected a JSON object"),
        (b'{"id":1,"result":"' + b"x" * 2_000_000, jsonrpc.UnavailableError, "expected at most 1048576 bytes"),
        (b'{"id":1,"result":5,"error":null}', jsonrpc.JsonRpcError, "with a bad result: expected str, found a number"),
        (b'{"id":1}', jsonrpc.JsonRpcError, "with a bad result: expected str, found null"),
        (b'{"id":1,"result":null,"error":{"code":5}}', jsonrpc.RemoteError, "{'code': 5}"),
        (b'{"id":null,"result":null,"error":"full"}', jsonrpc.DeadlineExceededError, ""),
        (b'{"id":7,"result":"x"}{"id":"1"}{}', jsonrpc.DeadlineExceededError, "was not answered by"),
    ],
)
def test_a_server_that_answers_badly(run: Run, reply: bytes, error: type[Exception], says: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(reply)
        await reader.read()
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, jsonrpc.connect(f"127.0.0.1:{port}", TRIAL, deadline=0.5) as client:
            with pytest.raises(error) as caught:
                await client.Echo("x")
            assert says in str(caught.value)
            assert len(str(caught.value)) < 300

    run(scenario)


def test_a_call_has_no_more_time_than_the_one_it_is_made_for(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial, jsonrpc.connect(trial.address, TRIAL) as client:
            context.current.set(context.incoming(None, time.monotonic() + 0.1))
            begun = time.monotonic()
            with pytest.raises(jsonrpc.DeadlineExceededError):
                await client.Wait("a")
            assert time.monotonic() - begun < 2

    run(scenario)


def test_an_argument_of_another_type_is_not_sent(run: Run) -> None:
    async def scenario() -> None:
        async with served() as trial, jsonrpc.connect(trial.address, TRIAL) as client:
            with pytest.raises(TypeError, match=r"^trial\.Echo: expected str, found int$"):
                await client.Echo(5)  # type: ignore[arg-type]
            with pytest.raises(AttributeError):
                await client.Ehco("x")  # type: ignore[attr-defined]

    run(scenario)


def test_a_server_that_is_full_is_not_called(run: Run) -> None:
    async def scenario() -> None:
        async with served(jsonrpc.Limits(connections=1)) as trial, jsonrpc.connect(trial.address, TRIAL) as first:
            await first.Echo("x")
            async with jsonrpc.connect(trial.address, TRIAL) as second:
                with pytest.raises(jsonrpc.UnavailableError, match=r"call again elsewhere$|broke|closed"):
                    await second.Echo("x")
            assert await first.Echo("x") == "x"

    run(scenario)
