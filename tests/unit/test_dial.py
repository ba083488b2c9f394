"""Channels by name: real servers, found in a registry in memory, through the xDS bridge of this process."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent import futures
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from socket import create_server
from typing import Any, Self

import grpc
import grpc.aio
import pytest

import rollcall
from contracts.hello.v1.hello import HELLO
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall import context as contexts
from rollcall import jsonrpc
from rollcall.discovery.bridge import bridge
from rollcall.discovery.membership import dialled
from rollcall.life import Life
from rollcall.policy import Policy
from rollcall.registry import Instance, TtlCheck
from rollcall.settings import ServiceSettings, load
from services.hello.handler import Hello
from services.sum.handler import Sum
from tests.waiting import eventually, free_port

CHECK = TtlCheck(60)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
Behaviour = Callable[[grpc.ServicerContext, int], None]


class Server(sum_pb2_grpc.SumServiceServicer, person_pb2_grpc.PersonServiceServicer):
    """Serves both contracts and does on each call what the test wants; `calls` counts them."""

    def __init__(self, behave: Behaviour = lambda _context, _call: None, port: int = 0) -> None:
        self.calls = 0
        self._behave, self._counting = behave, threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        sum_pb2_grpc.add_SumServiceServicer_to_server(self, self._server)
        person_pb2_grpc.add_PersonServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def _called(self, context: grpc.ServicerContext) -> None:
        with self._counting:
            self.calls += 1
            call = self.calls
        self._behave(context, call)

    def Add(self, request: sum_pb2.AddRequest, context: grpc.ServicerContext) -> sum_pb2.AddResponse:
        self._called(context)
        return sum_pb2.AddResponse(res=request.num1 + request.num2)

    def Do(self, request: person_pb2.Person, context: grpc.ServicerContext) -> person_pb2.Person:
        self._called(context)
        return request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)


@pytest.fixture
def registry() -> rollcall.MemoryRegistry:
    return rollcall.MemoryRegistry()


@pytest.fixture
def name() -> str:
    """The name of a service that no other test calls: what gRPC knows of one lives as long as the process."""
    return f"service-{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [each for each in os.environ if each.startswith("ROLLCALL_")]:
        monkeypatch.delenv(variable)


def sign_up(registry: rollcall.MemoryRegistry, name: str, port: int, **fields: Any) -> Instance:
    instance = Instance(**{"id": f"{name}-{port}", "name": name, "address": "127.0.0.1", "port": port, **fields})
    registry.register(instance, CHECK)
    return instance


def add(channel: grpc.Channel, **arguments: Any) -> int:
    answer = sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=333, num2=666), **arguments)
    return answer.res


def do(channel: grpc.Channel, **arguments: Any) -> str:
    """Call a method that must not run twice."""
    answer = person_pb2_grpc.PersonServiceStub(channel).Do(person_pb2.Person(name="jq"), **arguments)
    return answer.name


@contextmanager
def failing(code: grpc.StatusCode) -> Iterator[list[str]]:
    """Expect a call to fail with a code; yields a list that gets its details."""
    details = list[str]()
    with pytest.raises(grpc.RpcError) as caught:
        yield details
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == code, caught.value
    details.append(caught.value.details() or "")


def wait_for(event: threading.Event) -> Behaviour:
    def behave(_context: grpc.ServicerContext, _call: int) -> None:
        event.wait(10)

    return behave


def abort(code: grpc.StatusCode, times: int = 10**9) -> Behaviour:
    def behave(context: grpc.ServicerContext, call: int) -> None:
        if call <= times:
            context.abort(code, "as the test wants it")

    return behave


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ["grpc And consul", "UPPER", "a/b?c=d&e#f", "100% a%20b+c~d~~e", "點名", "a:b@c", "[x]"]
)
def test_a_service_is_found_whatever_its_name(registry: rollcall.MemoryRegistry, odd: str) -> None:
    with Server() as server:
        sign_up(registry, odd, server.port, tags=("a tag/of its own",))
        with rollcall.dial_sync(odd, registry=registry) as channel:
            assert add(channel) == 999
        with rollcall.dial_sync(odd, tag="a tag/of its own", registry=registry) as channel:
            assert add(channel) == 999


def test_the_channel_for_asyncio(registry: rollcall.MemoryRegistry, name: str) -> None:
    async def test() -> None:
        async with rollcall.dial(name, registry=registry) as channel:
            answer = await sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=1, num2=2))
            assert answer.res == 3
            assert channel.get_state() == grpc.ChannelConnectivity.READY

    with Server() as server:
        sign_up(registry, name, server.port)
        asyncio.run(test())


def test_only_those_with_the_tag_are_called(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as stable, Server() as canary:
        sign_up(registry, name, stable.port, tags=("stable",))
        sign_up(registry, name, canary.port, tags=("canary",))
        with rollcall.dial_sync(name, tag="canary", registry=registry) as channel:
            assert [add(channel) for _ in range(10)] == [999] * 10
        assert (stable.calls, canary.calls) == (0, 10)


def test_those_of_a_higher_priority_number_are_called_while_there_is_no_other(
    registry: rollcall.MemoryRegistry, name: str
) -> None:
    with Server() as far, ExitStack() as stack:
        near = stack.enter_context(Server())
        for server, priority in ((near, 0), (far, 1)):
            sign_up(registry, name, server.port, priority=priority)
        with rollcall.dial_sync(name, registry=registry) as channel:
            for _ in range(20):
                assert add(channel) == 999
            assert (near.calls, far.calls) == (20, 0)
            stack.close()  # it is listed still: what is found out is that it cannot be reached
            for _ in range(20):
                assert add(channel) == 999
            assert (near.calls, far.calls) == (20, 20)
            with Server(port=near.port) as again:
                eventually("it is called again", lambda: add(channel) and again.calls)
                before = far.calls
                for _ in range(20):
                    assert add(channel) == 999
                assert far.calls == before
            registry.deregister(f"{name}-{near.port}")
            for _ in range(20):
                assert add(channel) == 999
            assert far.calls == before + 20


def test_one_that_is_added_is_called_and_one_that_goes_is_not(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as first, Server() as second, rollcall.dial_sync(name, registry=registry) as channel:
        gone = sign_up(registry, name, first.port)
        assert add(channel) == 999
        sign_up(registry, name, second.port)
        eventually("the second is called", lambda: add(channel) and second.calls)
        registry.deregister(gone.id)

        def none_to_the_first() -> bool:
            before = first.calls
            for _ in range(6):
                add(channel)
            return first.calls == before

        eventually("the first is not called any more", none_to_the_first)


def test_an_unknown_service_says_what_was_looked_for_and_what_there_is(
    registry: rollcall.MemoryRegistry, name: str
) -> None:
    sign_up(registry, "something else", 1)
    begun = time.monotonic()
    with rollcall.dial_sync(name, registry=registry, deadline=3) as channel:
        with failing(grpc.StatusCode.UNAVAILABLE) as details:
            add(channel)
        assert details[0] == (
            f"no instance of service '{name}' passes its checks in the registry in memory; "
            "registered there: something else"
        )
        with failing(grpc.StatusCode.UNAVAILABLE), Server() as server:
            do(channel)
        assert time.monotonic() - begun < 3
        with Server() as server:  # and once there is one, it is called
            sign_up(registry, name, server.port)
            eventually("it is called", lambda: quietly(lambda: add(channel)))


def quietly(call: Callable[[], Any]) -> Any:
    with suppress(grpc.RpcError):
        return call()


def have_been_called(channel: grpc.Channel, *servers: Server) -> bool:
    """Call once more; say whether each of the servers has been called by now."""
    quietly(lambda: do(channel))
    return all(server.calls for server in servers)


def twenty_in_a_row(channel: grpc.Channel) -> bool:
    """Say whether so many calls are answered well, one after the other: whether nobody who fails is called."""
    return all(quietly(lambda: do(channel)) for _ in range(20))


def test_an_unknown_tag_is_named(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as server:
        sign_up(registry, name, server.port, tags=("stable",))
        with rollcall.dial_sync(name, tag="canary", registry=registry) as channel:
            with failing(grpc.StatusCode.UNAVAILABLE) as details:
                add(channel)
            assert f"no instance of service '{name}' with tag 'canary' passes" in details[0]


@pytest.mark.parametrize("servers", [1, 3])
def test_a_registry_that_hangs_is_told_of_within_the_deadline(name: str, servers: int) -> None:
    listeners = [create_server(("127.0.0.1", 0), backlog=64) for _ in range(servers)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    registry = rollcall.ConsulRegistry(addresses)
    with rollcall.dial_sync(name, registry=registry, deadline=6) as channel:
        begun = time.monotonic()
        with failing(grpc.StatusCode.UNAVAILABLE) as details:
            add(channel)
        assert time.monotonic() - begun < 6
        assert details[0] == f"no instance of service '{name}' is known: {registry} has not answered yet"
    for listener in listeners:
        listener.close()


class Slow(rollcall.MemoryRegistry):
    """A registry that takes its time to say what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def services(self) -> tuple[str, ...]:
        self.asked.set()
        self.go.wait(10)
        return super().services()


def test_a_call_that_waits_for_an_explanation_is_made_when_an_instance_has_come_meanwhile(name: str) -> None:
    registry = Slow()
    with Server() as server, rollcall.dial_sync(name, registry=registry, deadline=20) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        call = stub.Add.future(sum_pb2.AddRequest(num1=333, num2=666))
        assert registry.asked.wait(10)
        sign_up(registry, name, server.port)
        assert add(channel) == 999
        registry.go.set()
        assert call.result().res == 999


def test_no_call_is_cancelled_when_the_first_instance_comes(registry: rollcall.MemoryRegistry, name: str) -> None:
    """Those on their way to where it is explained that there is none: six times, as not each time one is."""
    statuses: Counter[grpc.StatusCode] = Counter()
    done = threading.Event()

    def call(channel: rollcall.SyncChannel) -> None:
        while not done.is_set():
            try:
                add(channel)
                statuses[grpc.StatusCode.OK] += 1
            except grpc.RpcError as error:
                statuses[error.code()] += 1

    for turn in range(6):
        statuses.clear()
        done.clear()
        each = f"{name}-{turn}"
        with Server() as server, rollcall.dial_sync(each, registry=registry, deadline=5) as channel:
            callers = [threading.Thread(target=call, args=[channel]) for _ in range(8)]
            for caller in callers:
                caller.start()
            eventually("it is explained", lambda: statuses[grpc.StatusCode.UNAVAILABLE] > 20)
            sign_up(registry, each, server.port)
            eventually("it is called", lambda: statuses[grpc.StatusCode.OK] > 100)
            done.set()
            for caller in callers:
                caller.join()
        assert {*statuses} == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_a_registry_that_is_not_there_is_told_of_within_the_deadline(name: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    registry = rollcall.ConsulRegistry([address])
    with (
        rollcall.dial_sync(name, registry=registry, deadline=4) as channel,
        failing(grpc.StatusCode.UNAVAILABLE) as details,
    ):
        add(channel)
    assert address in details[0]


def test_an_address_that_is_registered_twice_is_called_once(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as server:
        sign_up(registry, name, server.port)
        sign_up(registry, name, server.port, id=f"{name}-the-former", address="localhost")
        with rollcall.dial_sync(name, registry=registry) as channel:
            assert add(channel) == 999


def test_what_cannot_be_a_host_name_is_left_out(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as server, Server() as other:
        sign_up(registry, name, server.port)
        sign_up(registry, name, server.port, id=f"{name}-odd", address="a..b")
        with rollcall.dial_sync(name, registry=registry) as channel:
            assert add(channel) == 999
            sign_up(registry, name, other.port)
            eventually("changes are heard of", lambda: add(channel) and other.calls)


def test_gRPC_s_arguments_by_position(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server() as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            stub: Any = sum_pb2_grpc.SumServiceStub(channel)
            assert stub.Add(sum_pb2.AddRequest(num1=1), 5, (("key", "value"),)).res == 1


def test_of_a_large_service_only_a_subset_is_called(registry: rollcall.MemoryRegistry, name: str) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server()) for _ in range(6)]
        for server in servers:
            sign_up(registry, name, server.port)
        channel = stack.enter_context(rollcall.dial_sync(name, registry=registry, subset=2))

        def called() -> set[int]:
            for _ in range(20):
                add(channel)
            return {server.port for server in servers if server.calls}

        eventually("two of six are called", lambda: len(called()) == 2)
        chosen = called()
        gone = min(chosen)
        registry.deregister(f"{name}-{gone}")
        eventually("another takes the place of one that has gone", lambda: len(called()) == 3)
        assert chosen < called()


def test_a_service_that_loses_all_its_instances_keeps_them_for_a_while(
    registry: rollcall.MemoryRegistry, name: str
) -> None:
    with Server() as server, rollcall.dial_sync(name, registry=registry, empty_grace=0.5) as channel:
        instance = sign_up(registry, name, server.port)
        assert add(channel) == 999
        begun = time.monotonic()
        registry.deregister(instance.id)

        eventually("it has none", lambda: not quietly(lambda: add(channel)))
        with failing(grpc.StatusCode.UNAVAILABLE) as details:
            add(channel)
        assert f"no instance of service '{name}'" in details[0]
        assert time.monotonic() - begun >= 0.5
        sign_up(registry, name, server.port)
        eventually("it has one again", lambda: quietly(lambda: add(channel)))


def test_host_names_are_resolved_and_one_that_cannot_be_is_left_out(
    registry: rollcall.MemoryRegistry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Server() as server:
        sign_up(registry, name, server.port, address="localhost")
        sign_up(registry, name, 1, address="no-such-host.invalid")
        with rollcall.dial_sync(name, registry=registry) as channel:
            assert [add(channel) for _ in range(4)] == [999] * 4
    assert "no-such-host.invalid" in caplog.text


def test_an_empty_name_is_refused(registry: rollcall.MemoryRegistry) -> None:
    with pytest.raises(ValueError, match="name of a service to dial"):
        rollcall.dial_sync("", registry=registry)


def test_a_bad_setting_is_refused(registry: rollcall.MemoryRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rollcall.BadSettingError, match="ROLLCALL_RETRIES"):
        rollcall.dial_sync("sum", registry=registry, retries=99)
    monkeypatch.setenv("ROLLCALL_DEADLINE", "soon")
    with pytest.raises(rollcall.BadSettingError, match="ROLLCALL_DEADLINE"):
        rollcall.dial_sync("sum", registry=registry)


def test_one_name_in_two_registries_is_two_services(registry: rollcall.MemoryRegistry, name: str) -> None:
    other = rollcall.MemoryRegistry()
    with Server() as here, Server() as there:
        sign_up(registry, name, here.port)
        sign_up(other, name, there.port)
        with (
            rollcall.dial_sync(name, registry=registry) as one,
            rollcall.dial_sync(name, registry=other) as another,
        ):
            assert [add(one), add(another), add(another)] == [999] * 3
        assert (here.calls, there.calls) == (1, 2)


def test_watches_end_with_the_last_channel(registry: rollcall.MemoryRegistry, name: str) -> None:
    def watching() -> int:
        return sum(thread.name == f"watch {name}" for thread in threading.enumerate())

    async def aio() -> None:
        async with rollcall.dial(name, registry=registry):
            assert watching() == 1

    with Server() as server:
        sign_up(registry, name, server.port)
        one, other = (rollcall.dial_sync(name, registry=registry) for _ in range(2))
        assert add(one) == add(other) == 999
        assert watching() == 1, "one watch serves all channels to a service"
        one.close()
        one.close()  # harmless
        assert add(other) == 999
        other.close()
        eventually("the watch has ended", lambda: not watching())
        asyncio.run(aio())
        eventually("the watch has ended", lambda: not watching())
        with rollcall.dial_sync(name, registry=registry) as again:
            assert add(again) == 999


def test_a_channel_knows_nothing_of_where_a_former_one_has_called(registry: rollcall.MemoryRegistry, name: str) -> None:
    """What gRPC knows under a key may outlive the channel: so a key is never used again."""
    keys = set()
    for _ in range(3):
        service = bridge().subscribe(name, "", registry, Policy({}))
        keys.add(service.key)
        bridge().release(service)
    assert len(keys) == 3


def test_nothing_is_left_of_a_channel_that_was_never_called_on(registry: rollcall.MemoryRegistry, name: str) -> None:
    service = bridge().subscribe(name, "", registry, Policy({}))
    left = weakref.ref(service)
    bridge().release(service)
    del service
    eventually("it is forgotten", lambda: gc.collect() is not None and left() is None)


def test_nor_of_one_that_could_not_be_made(registry: rollcall.MemoryRegistry, name: str) -> None:
    with pytest.raises(RuntimeError, match="event loop"), futures.ThreadPoolExecutor(1) as without_a_loop:
        without_a_loop.submit(rollcall.dial, name, registry=registry).result()
    assert name not in dialled()


# --- calling ----------------------------------------------------------------------------------------------------------


AGAIN = pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
"""What is answered by who is not there, and by who is asked to stop just then."""


@AGAIN
def test_an_idempotent_method_is_tried_again(
    registry: rollcall.MemoryRegistry, name: str, code: grpc.StatusCode
) -> None:
    with Server(abort(code, times=2)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            assert add(channel) == 999
        assert server.calls == 3


def test_as_often_as_it_was_set(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server(abort(grpc.StatusCode.UNAVAILABLE)) as server:
        sign_up(registry, name, server.port)
        for retries, calls in ((1, 2), (0, 3)):
            with (
                rollcall.dial_sync(name, registry=registry, retries=retries, failure_percent=0) as channel,
                failing(grpc.StatusCode.UNAVAILABLE),
            ):
                add(channel)
            assert server.calls == calls


@AGAIN
def test_any_other_method_is_not_tried_again(
    registry: rollcall.MemoryRegistry, name: str, code: grpc.StatusCode
) -> None:
    with Server(abort(code, times=1)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            with failing(code):
                do(channel)
            assert server.calls == 1
            assert do(channel) == "jq"


def only_when_tried_again(context: grpc.ServicerContext, _call: int) -> None:
    if all(key != "grpc-previous-rpc-attempts" for key, _ in context.invocation_metadata()):
        context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")


def test_but_it_is_once_its_caller_says_that_it_may(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server(only_when_tried_again) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry, failure_percent=0) as channel:
            with failing(grpc.StatusCode.UNAVAILABLE):
                do(channel)
            assert server.calls == 1
            channel.idempotent("/person.v1.PersonService/Do")
            channel.idempotent("/person.v1.PersonService/Do")  # harmless
            eventually("it is tried again", lambda: quietly(lambda: do(channel)))


def test_so_it_is_on_a_channel_for_asyncio(registry: rollcall.MemoryRegistry, name: str) -> None:
    async def test(server: Server) -> None:
        sign_up(registry, name, server.port)
        async with rollcall.dial(name, registry=registry) as channel:
            channel.idempotent("/person.v1.PersonService/Do")
            do = channel.unary_unary("/person.v1.PersonService/Do")  # without its generated code
            person = person_pb2.Person(name="jq").SerializeToString()
            assert await do(person) == person

    with Server(only_when_tried_again) as server:
        asyncio.run(test(server))


@pytest.mark.parametrize("method", ["", "Do", "person.v1.PersonService/Do", "/person.v1.PersonService", "/a/b/c"])
def test_what_is_no_method_cannot_be_idempotent(registry: rollcall.MemoryRegistry, name: str, method: str) -> None:
    with (
        rollcall.dial_sync(name, registry=registry) as channel,
        pytest.raises(ValueError, match="expected a method as /package"),
    ):
        channel.idempotent(method)


def test_nor_is_any_method_after_another_failure(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server(abort(grpc.StatusCode.INTERNAL)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel, failing(grpc.StatusCode.INTERNAL):
            add(channel)
        assert server.calls == 1


def test_a_call_that_has_reached_no_server_waits_for_one(registry: rollcall.MemoryRegistry, name: str) -> None:
    port = free_port()
    sign_up(registry, name, port)
    with rollcall.dial_sync(name, registry=registry, deadline=10) as channel, futures.ThreadPoolExecutor() as pool:
        call = pool.submit(do, channel)
        state = list[grpc.ChannelConnectivity]()
        channel.subscribe(state.append)
        eventually("nobody is there", lambda: grpc.ChannelConnectivity.TRANSIENT_FAILURE in state)
        assert not call.done()
        with Server(port=port) as server:
            assert call.result(10) == "jq"
            assert server.calls == 1


def test_deadlines(registry: rollcall.MemoryRegistry, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[float | None]()

    with Server(lambda context, _: seen.append(context.time_remaining())) as server:
        sign_up(registry, name, server.port)

        def left(*, timeout: float | None = None, **settings: Any) -> float:
            with rollcall.dial_sync(name, registry=registry, **settings) as channel:
                add(channel, timeout=timeout)
            last = seen.pop()
            assert last is not None
            return last

        assert 4 < left() < 5.1
        assert 8 < left(deadline=9) < 9.1
        assert 1 < left(timeout=2, deadline=9) < 2.1
        assert 19 < left(timeout=20) < 20.1
        monkeypatch.setenv("ROLLCALL_DEADLINE", "7")
        assert 6 < left() < 7.1
        assert 8 < left(deadline=9) < 9.1


def test_a_call_ends_at_its_deadline(registry: rollcall.MemoryRegistry, name: str) -> None:
    over = threading.Event()

    with Server(wait_for(over)) as server:
        sign_up(registry, name, server.port)
        begun = time.monotonic()
        with (
            rollcall.dial_sync(name, registry=registry, deadline=0.3) as channel,
            failing(grpc.StatusCode.DEADLINE_EXCEEDED),
        ):
            add(channel)
        assert 0.2 < time.monotonic() - begun < 2
        over.set()


def test_more_calls_at_once_than_allowed_are_refused(registry: rollcall.MemoryRegistry, name: str) -> None:
    over = threading.Event()
    with Server(wait_for(over)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry, max_requests=2) as channel:
            stub = person_pb2_grpc.PersonServiceStub(channel)
            calls = [stub.Do.future(person_pb2.Person()) for _ in range(2)]
            eventually("both are being handled", lambda: server.calls == 2)
            begun = time.monotonic()
            with failing(grpc.StatusCode.UNAVAILABLE):
                do(channel)
            assert time.monotonic() - begun < 1, "at once"
            over.set()
            assert all(call.result() for call in calls)
            assert do(channel) == "jq"
        assert server.calls == 3


def test_the_default_deadline_of_an_open_channel_changes(
    registry: rollcall.MemoryRegistry, name: str, configured: Callable[..., None]
) -> None:
    over = threading.Event()
    with Server(wait_for(over)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            stub = sum_pb2_grpc.SumServiceStub(channel)
            configured(deadline=0.3)
            begun = time.monotonic()
            with failing(grpc.StatusCode.DEADLINE_EXCEEDED):
                stub.Add(sum_pb2.AddRequest())
            assert time.monotonic() - begun < 2
            over.set()


def test_how_often_calls_on_an_open_channel_are_tried_changes(
    registry: rollcall.MemoryRegistry, name: str, configured: Callable[..., None]
) -> None:
    with Server(abort(grpc.StatusCode.UNAVAILABLE)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry, failure_percent=0) as channel:

            def tries() -> int:
                before = server.calls
                with failing(grpc.StatusCode.UNAVAILABLE):
                    add(channel)
                return server.calls - before

            assert tries() == 4
            configured(retries=0)
            eventually("calls are tried once", lambda: tries() == 1)
            configured(retries=1)
            eventually("calls are tried twice", lambda: tries() == 2)


def test_the_most_calls_in_flight_on_an_open_channel_change(
    registry: rollcall.MemoryRegistry, name: str, configured: Callable[..., None]
) -> None:
    over = threading.Event()
    with Server(wait_for(over)) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            stub = person_pb2_grpc.PersonServiceStub(channel)
            held = [stub.Do.future(person_pb2.Person()) for _ in range(2)]
            eventually("both are being handled", lambda: server.calls == 2)
            configured(max_requests=2)

            def refused() -> bool:
                call = stub.Do.future(person_pb2.Person(), timeout=0.2)
                return bool(call.code() == grpc.StatusCode.UNAVAILABLE)  # else it has waited for its deadline

            eventually("the next is refused", refused)
            over.set()
            assert all(call.result() for call in held)


def test_an_instance_whose_calls_fail_is_put_aside_once_that_is_configured(
    registry: rollcall.MemoryRegistry, name: str, configured: Callable[..., None]
) -> None:
    with Server(abort(grpc.StatusCode.UNAVAILABLE)) as bad, Server() as good:
        for server in (bad, good):
            sign_up(registry, name, server.port)
        configured(failure_percent=0)
        with rollcall.dial_sync(name, registry=registry, ejection=60) as channel:
            eventually("both are called", lambda: have_been_called(channel, bad, good))
            ends = time.monotonic() + 3
            while time.monotonic() < ends:
                assert not twenty_in_a_row(channel), "it is never put aside"
            configured(failure_percent=50)
            eventually("the bad one is put aside", lambda: twenty_in_a_row(channel))


def test_an_instance_whose_calls_fail_is_put_aside(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server(abort(grpc.StatusCode.UNAVAILABLE)) as bad, Server() as good:
        for server in (bad, good):
            sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry, ejection=60) as channel:
            eventually("both are called", lambda: have_been_called(channel, bad, good))
            eventually("the bad one is put aside", lambda: twenty_in_a_row(channel))
        assert bad.calls > 5
        assert good.calls >= 20


def test_none_is_put_aside_when_that_is_off(registry: rollcall.MemoryRegistry, name: str) -> None:
    with Server(abort(grpc.StatusCode.UNAVAILABLE)) as bad, Server() as good:
        for server in (bad, good):
            sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry, failure_percent=0) as channel:
            until = time.monotonic() + 2.2  # longer than it takes above
            while time.monotonic() < until:
                quietly(lambda: do(channel))
            assert not all(quietly(lambda: do(channel)) for _ in range(20))


def test_deadline_and_trace_go_along_the_chain(registry: rollcall.MemoryRegistry, name: str) -> None:
    front_name, back_name = f"front of {name}", f"back of {name}"
    seen = list[tuple[contexts.CallContext | None, float | None]]()

    class Back(sum_pb2_grpc.SumServiceServicer):
        async def Add(self, request: sum_pb2.AddRequest, context: Any) -> sum_pb2.AddResponse:
            seen.append((contexts.current.get(), context.time_remaining()))
            return sum_pb2.AddResponse(res=request.num1 + request.num2)

    class Front(sum_pb2_grpc.SumServiceServicer):
        async def Add(self, request: sum_pb2.AddRequest, context: Any) -> sum_pb2.AddResponse:
            seen.append((contexts.current.get(), context.time_remaining()))
            async with rollcall.dial(back_name, registry=registry, deadline=60) as channel:
                return await sum_pb2_grpc.SumServiceStub(channel).Add(request)

    async def test() -> None:
        settings, stop = load(ServiceSettings, ["--drain", "0", "--grace", "1"]), asyncio.Event()
        up = asyncio.Queue[Instance]()
        async with asyncio.TaskGroup() as group:
            for service_name, servicer in ((front_name, Front()), (back_name, Back())):
                service = rollcall.Service(service_name)
                service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, servicer)
                group.create_task(service.live(settings, registry, stop, up.put_nowait))
            by_name = {instance.name: instance for instance in [await up.get(), await up.get()]}
            async with grpc.aio.insecure_channel(by_name[front_name].target) as channel:
                stub = sum_pb2_grpc.SumServiceStub(channel)
                metadata = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-00"),)
                answer = await stub.Add(sum_pb2.AddRequest(num1=1, num2=2), timeout=3, metadata=metadata)
                assert answer.res == 3
            stop.set()

    asyncio.run(test())
    (front, left_in_front), (back, left_in_back) = seen
    assert front is not None
    assert back is not None
    assert (front.trace_id, front.flags) == (back.trace_id, back.flags) == (TRACE, "00")
    assert left_in_front is not None
    assert left_in_back is not None
    assert left_in_front < 3.1, "gRPC rounds a little"
    assert 1 < left_in_back < 3.1, "not the 60 of its channel"


def registered_meta(service: Life) -> Mapping[str, str]:
    """Let an instance live until it is registered, and return what it has registered of itself."""
    settings, stop, found = load(ServiceSettings, ["--drain", "0", "--grace", "0"]), asyncio.Event(), list[Instance]()

    def on_ready(instance: Instance) -> None:
        found.append(instance)
        stop.set()

    asyncio.run(service.live(settings, rollcall.MemoryRegistry(), stop, on_ready))
    return found[0].meta


def test_an_instance_registers_what_it_speaks_and_whom_it_calls(registry: rollcall.MemoryRegistry, name: str) -> None:
    @asynccontextmanager
    async def servicer(_: ServiceSettings) -> AsyncIterator[Sum]:
        with ExitStack() as stack:
            for called in (f"b {name}", f"a {name}", f"a {name}", f"with, comma {name}"):
                stack.enter_context(rollcall.dial_sync(called, registry=registry))
            yield Sum()

    service = rollcall.Service(name)
    service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, servicer)
    meta = registered_meta(service)
    assert (meta["protocol"], meta["calls"]) == ("grpc", f"a {name},b {name}")
    hello = jsonrpc.Service(name)
    hello.register(HELLO, Hello())
    meta = registered_meta(hello)
    assert (meta["protocol"], "calls" in meta) == ("jsonrpc", False)


def test_whom_it_calls_is_cut_to_what_a_registry_takes(registry: rollcall.MemoryRegistry, name: str) -> None:
    names = [f"點名 {number:02} {name}" for number in range(40)]
    service = rollcall.Service(name)
    with ExitStack() as stack:
        for each in names:
            stack.enter_context(rollcall.dial_sync(each, registry=registry))
        calls = registered_meta(service)["calls"]
    assert 450 < len(calls.encode()) <= 512
    assert calls.split(",") == names[: calls.count(",") + 1], "whole names"


def test_a_trace_that_the_caller_gives_is_kept(registry: rollcall.MemoryRegistry, name: str) -> None:
    seen = list[str]()

    def note(context: grpc.ServicerContext, _: int) -> None:
        seen.extend(str(value) for key, value in context.invocation_metadata() if key == "traceparent")

    with Server(note) as server:
        sign_up(registry, name, server.port)
        with rollcall.dial_sync(name, registry=registry) as channel:
            add(channel, metadata=(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-00"), ("other", "kept")))
    assert seen == [f"00-{TRACE}-00f067aa0ba902b7-00"]


# --- beside another xDS server ----------------------------------------------------------------------------------------

PROGRAM = """
import os, rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
registry = rollcall.MemoryRegistry()
instance = rollcall.Instance(id="a", name="sum", address="127.0.0.1", port=int(os.environ["PORT"]))
registry.register(instance, rollcall.TtlCheck())
with rollcall.dial_sync("sum", registry=registry) as channel:
    assert sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=1, num2=2)).res == 3
print(os.environ["GRPC_XDS_BOOTSTRAP_CONFIG"])
"""
THEIRS = {
    "xds_servers": [
        {
            "server_uri": "xds.example.invalid:443",
            "channel_creds": [{"type": "insecure"}],
            "server_features": ["xds_v3"],
        }
    ],
    "node": {"id": "theirs"},
    "authorities": {"another": {}},
}


def bootstrap(**env: str) -> Any:
    """Return the bootstrap of a process of its own: gRPC reads it once per process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_XDS")}
    with Server() as server:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**clean, "PORT": str(server.port), **env},
            capture_output=True,
            check=False,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_bootstrap_of_our_own() -> None:
    config = bootstrap()
    assert list(config["authorities"]) == ["rollcall"]
    assert config["xds_servers"] == config["authorities"]["rollcall"]["xds_servers"]


@pytest.mark.parametrize("by", ["file", "text", "file wins over text"])
def test_the_user_s_bootstrap_is_kept(by: str, tmp_path: Path) -> None:
    file, text = tmp_path / "bootstrap.json", json.dumps(THEIRS)
    file.write_text(text)
    env = {
        "file": {"GRPC_XDS_BOOTSTRAP": str(file)},
        "text": {"GRPC_XDS_BOOTSTRAP_CONFIG": text},
        "file wins over text": {"GRPC_XDS_BOOTSTRAP": str(file), "GRPC_XDS_BOOTSTRAP_CONFIG": "{}"},
    }
    config = bootstrap(**env[by])
    assert config["xds_servers"] == THEIRS["xds_servers"]
    assert config["node"] == THEIRS["node"]
    assert sorted(config["authorities"]) == ["another", "rollcall"]


def test_a_process_that_has_dialled_can_end() -> None:
    begun = time.monotonic()
    bootstrap()
    assert time.monotonic() - begun < 30


def test_a_blocked_event_loop_does_not_stop_discovery(registry: rollcall.MemoryRegistry, name: str) -> None:
    async def test() -> None:
        with Server() as first, Server() as second:
            gone = sign_up(registry, name, first.port)
            async with rollcall.dial(name, registry=registry) as channel:
                stub = sum_pb2_grpc.SumServiceStub(channel)
                await stub.Add(sum_pb2.AddRequest(num1=1))
                with closing(grpc.insecure_channel(f"127.0.0.1:{second.port}")):
                    sign_up(registry, name, second.port)
                    registry.deregister(gone.id)
                    with rollcall.dial_sync(name, registry=registry) as sync:  # on the thread of the loop: blocks it
                        eventually("the second is called", lambda: add(sync) and second.calls)
                before = first.calls
                for _ in range(4):
                    await stub.Add(sum_pb2.AddRequest(num1=1))
                assert first.calls == before

    asyncio.run(test())
