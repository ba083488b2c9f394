"""`jsonrpc.dial`: where a call goes, and what happens when it breaks; on real sockets, with a registry in memory."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest

from rollcall import BadSettingError, Instance, MemoryRegistry, TcpCheck, context, jsonrpc
from tests.waiting import free_port

SECONDS = 20


class Trial(Protocol):
    @jsonrpc.idempotent
    async def Who(self, text: str, /) -> str: ...

    async def Once(self, text: str, /) -> str: ...

    @jsonrpc.idempotent
    async def Wait(self, text: str, /) -> str: ...


TRIAL = jsonrpc.Contract("trial", Trial)


class Handler:
    """An instance that says its name, fails or waits, as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.held = 0
        """Calls that hang or wait."""
        self.failing = self.hanging = False
        self.go = asyncio.Event()

    async def Who(self, text: str) -> str:  # noqa: ARG002
        self.calls += 1
        if self.failing:
            raise jsonrpc.RefusedError("failing")
        if self.hanging:
            self.held += 1
            await asyncio.Event().wait()
        return self.name

    async def Once(self, text: str) -> str:
        return await self.Who(text)

    async def Wait(self, text: str) -> str:  # noqa: ARG002
        self.calls += 1
        self.held += 1
        await self.go.wait()
        return self.name


class Town:
    """Instances and their registry."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.handlers: dict[str, Handler] = {}
        self.servers: dict[str, jsonrpc.Server] = {}

    async def add(self, name: str, port: int = 0, limits: jsonrpc.Limits | None = None, priority: int = 0) -> None:
        await self.serve(name, port, limits)
        self.register(name, self.servers[name].port, priority)

    async def serve(self, name: str, port: int = 0, limits: jsonrpc.Limits | None = None) -> None:
        self.handlers[name], server = Handler(name), jsonrpc.Server(limits or jsonrpc.Limits())
        server.register(TRIAL, self.handlers[name])
        await server.listen("127.0.0.1", port)
        await server.start()
        self.servers[name] = server

    def register(self, name: str, port: int, priority: int = 0) -> None:
        instance = Instance(id=name, name="trial", address="127.0.0.1", port=port, priority=priority)
        self.registry.register(instance, TcpCheck())

    async def kill(self, name: str) -> None:
        """End an instance as if its process had died: nothing more is said."""
        for connection in tuple(self.servers[name].connections):
            connection.abort()
        await self.servers.pop(name).stop(0)

    def dial(self, **settings: Any) -> Any:
        return jsonrpc.dial(TRIAL, registry=self.registry, **settings)


@asynccontextmanager
async def town(*names: str) -> AsyncIterator[Town]:
    town = Town()
    for name in names:
        await town.add(name)
    try:
        yield town
    finally:
        for server in town.servers.values():
            await server.stop(0)


async def until(met: Callable[[], Any]) -> None:
    while not met():  # noqa: ASYNC110 (a condition of many parts)
        await asyncio.sleep(0.001)


async def spread(trial: Trial, calls: int = 30) -> Counter[str]:
    return Counter([await trial.Who("") for _ in range(calls)])


async def reaches(trial: Trial, *names: str) -> None:
    """Call until each of these has answered."""
    seen: set[str] = set()
    while not seen >= set(names):
        seen.add(await trial.Who(""))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await scenario()

    asyncio.run(bounded())


def test_calls_go_round() -> None:
    async def scenario() -> None:
        async with town("a", "b", "c") as here, here.dial() as trial:
            await reaches(trial, "a", "b", "c")
            assert await spread(trial) == {"a": 10, "b": 10, "c": 10}
            assert await trial.Who("") == jsonrpc.answered_by.get()

    run(scenario)


def test_instances_come_and_go() -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            await here.add("c")
            await reaches(trial, "c")
            here.registry.deregister("a")
            await until(lambda: not here.servers["a"].connections)
            assert set(await spread(trial)) == {"b", "c"}

    run(scenario)


def test_those_of_a_higher_priority_number_are_called_while_there_is_no_other() -> None:
    async def scenario() -> None:
        async with town("near") as here:
            await here.add("far", priority=1)
            async with here.dial() as trial:
                await reaches(trial, "near")
                assert await spread(trial) == {"near": 30}
                port = here.servers["near"].port
                await here.kill("near")
                assert await spread(trial) == {"far": 30}
                await here.serve("near", port)
                await reaches(trial, "near")
                assert await spread(trial) == {"near": 30}

    run(scenario)


def test_an_instance_that_is_removed_finishes_its_calls() -> None:
    async def scenario() -> None:
        async with town("a") as here, here.dial() as trial:
            call = asyncio.create_task(trial.Wait(""))
            await until(lambda: here.handlers["a"].held)
            await here.add("b")
            await reaches(trial, "b")
            here.registry.deregister("a")
            for _ in range(10):
                assert await trial.Who("") in "ab"  # "a" until the change has come
            assert here.servers["a"].connections
            here.handlers["a"].go.set()
            assert await call == "a"
            await until(lambda: not here.servers["a"].connections)

    run(scenario)


def test_a_call_that_breaks_is_made_elsewhere_if_it_may_be_made_twice() -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            for handler in here.handlers.values():
                handler.hanging = True
            again, once = (asyncio.create_task(call("")) for call in (trial.Who, trial.Once))
            await until(lambda: all(handler.held for handler in here.handlers.values()))
            before = sum(handler.calls for handler in here.handlers.values())
            for handler in here.handlers.values():
                handler.hanging = False
            for name in ("a", "b"):
                for connection in tuple(here.servers[name].connections):
                    connection.abort()
            assert await again in "ab"
            with pytest.raises(jsonrpc.UnavailableError, match=r"^trial\.Once may have run: ") as caught:
                await once
            assert caught.value.may_have_run
            assert sum(handler.calls for handler in here.handlers.values()) == before + 1

    run(scenario)


def test_retries_end() -> None:
    async def scenario() -> None:
        async with listening(drop) as port, town() as here, here.dial(retries=2) as trial:
            here.register("x", port)
            with pytest.raises(jsonrpc.UnavailableError, match=r"^trial\.Who, tried 3 times: "):
                await trial.Who("")

    run(scenario)


def test_a_call_that_outlives_the_grace_is_made_elsewhere_if_it_may_be_made_twice() -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            here.handlers["a"].hanging = here.handlers["b"].hanging = True
            calls = [asyncio.create_task(call("")) for call in (trial.Wait, trial.Wait, trial.Once, trial.Once)]
            await until(lambda: here.handlers["a"].held == here.handlers["b"].held == 2)
            await here.servers["a"].stop(0.1)
            here.handlers["b"].go.set()
            assert [await call for call in calls[:2]] == ["b", "b"]
            (lost, *_), _ = await asyncio.wait(calls[2:], return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(jsonrpc.UnavailableError, match=r"^trial\.Once may have run: .*; call again$") as caught:
                await lost
            assert caught.value.may_have_run

    run(scenario)


def test_an_instance_that_is_going_loses_no_call() -> None:
    """Not even one that must not run twice and comes when it is too late."""

    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            # One call is kept in flight, so that the connection stays while the instance refuses others.
            waiting = [asyncio.create_task(trial.Wait("")) for _ in range(2)]
            await until(lambda: all(handler.held for handler in here.handlers.values()))
            stopping = asyncio.create_task(here.servers["a"].stop(SECONDS))
            for _ in range(20):
                assert await trial.Once("") == "b"
            for handler in here.handlers.values():
                handler.go.set()
            assert {await call for call in waiting} == {"a", "b"}
            await stopping

    run(scenario)


async def found_nobody(trial: Trial) -> None:
    """Wait until connecting has failed, which calls with little time left say."""
    while True:
        context.current.set(context.incoming(None, time.monotonic() + 0.1))
        with pytest.raises(jsonrpc.DeadlineExceededError) as caught:
            await trial.Who("")
        if "no connection to" in str(caught.value):
            return


def test_calls_wait_for_instances_that_are_listed() -> None:
    async def scenario() -> None:
        port = free_port()
        async with town() as here, here.dial() as trial:
            here.register("a", port)
            call = asyncio.create_task(trial.Once(""))
            await found_nobody(trial)
            await here.serve("a", port)
            assert await call == "a"

    run(scenario)


def test_calls_that_wait_in_vain_say_for_what() -> None:
    async def scenario() -> None:
        port = free_port()
        async with town() as here, here.dial(deadline=0.5) as trial:
            here.register("a", port)
            with pytest.raises(jsonrpc.DeadlineExceededError, match=f"in 0.5 s: no connection to 127.0.0.1:{port}: "):
                await trial.Who("")

    run(scenario)


def test_nobody_there_is_said_at_once() -> None:
    async def scenario() -> None:
        async with town() as here, here.dial(tag="new") as trial:
            begun = time.monotonic()
            says = (
                "no instance of service 'trial' with tag 'new' passes its checks in the registry in memory; "
                "registered there: nothing"
            )
            with pytest.raises(jsonrpc.UnavailableError, match=f"^{says}$"):
                await trial.Who("")
            assert time.monotonic() - begun < 3

    run(scenario)


def test_an_instance_that_restarts_is_called_again() -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            port = here.servers["a"].port
            await here.kill("a")
            assert set(await spread(trial)) == {"b"}
            await here.serve("a", port)
            await reaches(trial, "a")

    run(scenario)


def test_an_instance_that_is_full_is_passed_over() -> None:
    async def scenario() -> None:
        async with town("a") as here:
            await here.add("b", limits=jsonrpc.Limits(connections=1))
            address = f"127.0.0.1:{here.servers['b'].port}"
            async with jsonrpc.connect(address, TRIAL) as taken:
                await taken.Who("")
                async with here.dial() as trial:
                    assert set(await spread(trial)) == {"a"}

    run(scenario)


async def failures(trial: Trial, calls: int) -> int:
    failed = 0
    for _ in range(calls):
        try:
            await trial.Who("")
        except jsonrpc.JsonRpcError:
            failed += 1
    return failed


def test_an_instance_that_only_fails_is_ejected_and_tried_again() -> None:
    async def scenario() -> None:
        async with town("a", "b", "c") as here, here.dial(ejection=16) as trial:  # at first for 2 s
            await reaches(trial, "a", "b", "c")
            here.handlers["b"].failing = here.handlers["c"].failing = True
            before = here.handlers["b"].calls + here.handlers["c"].calls
            assert await failures(trial, 90) > 5
            assert here.handlers["a"].calls > 30
            # One of three goes, and no more: the other goes on failing half of the calls.
            rest = {name: here.handlers[name].calls for name in "bc"}
            await failures(trial, 20)
            assert sorted(here.handlers[name].calls - rest[name] for name in "bc") == [0, 10]
            assert before < sum(rest.values())
            here.handlers["b"].failing = here.handlers["c"].failing = False
            begun = time.monotonic()
            await reaches(trial, "a", "b", "c")
            assert time.monotonic() - begun < 15

    run(scenario)


@asynccontextmanager
async def listening(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Yield a port at which connections are accepted, and then are up to `answer`."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read all that comes, and never answer: as a process that is stopped does."""
    await reader.read()
    writer.close()


async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Break the connection at the first call."""
    await reader.read(1)
    writer.transport.abort()


@pytest.mark.parametrize("trouble", [hang, drop])
def test_an_instance_that_does_not_answer_is_ejected(trouble: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rollcall.jsonrpc")

    async def scenario() -> None:
        async with (
            listening(trouble) as port,
            town("a") as here,
            here.dial(deadline=0.5, retries=0, ejection_percent=50, ejection=SECONDS) as trial,
        ):
            await reaches(trial, "a")
            here.register("x", port)
            while "x is ejected: 5 calls in a row have failed there" not in caplog.text:
                await failures(trial, 1)
            assert await spread(trial) == {"a": 30}

    run(scenario)


@pytest.mark.parametrize("settings", [{"failure_percent": 0}, {"ejection_percent": 0}])
def test_ejection_can_be_turned_off(settings: dict[str, int]) -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial(**settings) as trial:
            await reaches(trial, "a", "b")
            here.handlers["b"].failing = True
            assert await failures(trial, 40) == 20

    run(scenario)


def test_more_calls_than_allowed_are_refused_at_once() -> None:
    async def scenario() -> None:
        async with town("a") as here, here.dial(max_requests=3) as trial:
            calls = [asyncio.create_task(trial.Wait("")) for _ in range(3)]
            await until(lambda: here.handlers["a"].held == 3)
            with pytest.raises(
                jsonrpc.UnavailableError, match=r"^trial\.Who: 3 calls to 'trial' are in flight already$"
            ):
                await trial.Who("")
            here.handlers["a"].go.set()
            await asyncio.gather(*calls)
            assert await trial.Who("") == "a"

    run(scenario)


def test_what_is_configured_holds_for_channels_that_are_open(configured: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with town("a", "b") as here, here.dial() as trial:
            await reaches(trial, "a", "b")
            configured(deadline=0.1)
            with pytest.raises(jsonrpc.DeadlineExceededError):
                await trial.Wait("")
            configured(max_requests=1)
            held = asyncio.create_task(trial.Wait(""))
            await until(lambda: here.handlers["a"].held + here.handlers["b"].held == 2)
            with pytest.raises(jsonrpc.UnavailableError, match=r"1 calls to 'trial' are in flight already$"):
                await trial.Who("")
            for handler in here.handlers.values():
                handler.go.set()
            await held
            configured(ejection_percent=0)
            here.handlers["b"].failing = True
            assert await failures(trial, 40) == 20, "it is never ejected"
            configured(ejection_percent=50)
            await failures(trial, 40)
            assert await spread(trial) == {"a": 30}

    run(scenario)


def test_a_deadline_frees_what_the_call_held() -> None:
    async def scenario() -> None:
        async with town("a") as here, here.dial(max_requests=1, deadline=1) as trial:
            for _ in range(3):
                with pytest.raises(jsonrpc.DeadlineExceededError):
                    await trial.Wait("")
            here.handlers["a"].go.set()
            assert await trial.Who("") == "a"

    run(scenario)


def test_a_call_that_has_no_time_left_is_not_made() -> None:
    async def scenario() -> None:
        async with town("a") as here, here.dial() as trial:
            await reaches(trial, "a")
            before = here.handlers["a"].calls
            context.current.set(context.incoming(None, time.monotonic()))
            with pytest.raises(jsonrpc.DeadlineExceededError, match=r"^no time is left of the call"):
                await trial.Who("")
            assert here.handlers["a"].calls == before

    run(scenario)


def test_a_channel_that_is_closed_says_so_at_once() -> None:
    """To calls that wait for an instance, that are in flight, or that come later."""

    async def scenario() -> None:
        async with town() as empty, town("a") as here:
            empty.register("x", free_port())
            async with here.dial(deadline=SECONDS) as trial, empty.dial(deadline=SECONDS) as waiting:
                calls = [asyncio.create_task(call("")) for call in (trial.Wait, waiting.Who)]
                await until(lambda: here.handlers["a"].held)
            begun = time.monotonic()
            for call in (*calls, trial.Who(""), waiting.Once("")):
                with pytest.raises(jsonrpc.UnavailableError, match=r"^the channel to 'trial' is closed$"):
                    await call
            assert time.monotonic() - begun < 2

    run(scenario)


def test_a_bad_setting_is_refused_by_name() -> None:
    async def scenario() -> None:
        with pytest.raises(BadSettingError, match="retries"):
            async with jsonrpc.dial(TRIAL, registry=MemoryRegistry(), retries=-1):
                pass

    run(scenario)
