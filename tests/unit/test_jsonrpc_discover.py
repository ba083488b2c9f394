"""`rpc.discover`: what a server tells of itself, how it is called by nothing else, and servers that do not tell."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Protocol

import pytest
from jsonschema_rs import Draft202012Validator
from prometheus_client import generate_latest
from pydantic import AfterValidator, BaseModel, GetPydanticSchema
from pydantic_core import core_schema

from contracts.hello.v1.hello import HELLO
from rollcall import Instance, MemoryRegistry, TcpCheck, jsonrpc
from rollcall.telemetry import Telemetry
from services.hello.handler import Hello
from tests.waiting import free_port

SECONDS = 20


@dataclass
class Person:
    name: str
    born: date | None = None
    children: "list[Person] | None" = None


class Page(BaseModel):
    people: list[Person]
    more: bool = False


Checked = Annotated[Any, GetPydanticSchema(lambda _source, _handler: core_schema.is_instance_schema(object))]
"""A type that has no JSON Schema: code alone says what it takes."""


class People(Protocol):
    @jsonrpc.idempotent
    async def Find(self, person: Person, /) -> Page:
        """Find people
        who are like this one.
        """

    async def Count(self, names: list[str], /) -> int: ...

    async def Odd(self, anything: Checked, /) -> Annotated[str, AfterValidator(str.strip)]: ...


PEOPLE = jsonrpc.Contract("a.b people", People)


class Handler:
    async def Find(self, person: Person) -> Page:
        return Page(people=[person])

    async def Count(self, names: list[str]) -> int:
        return len(names)

    async def Odd(self, anything: Any) -> str:
        return str(anything)


class Names(Protocol):
    async def Count(self, names: list[str], /) -> str: ...


NAMES = jsonrpc.Contract("names", Names)


class Counter:
    async def Count(self, names: list[str]) -> str:
        return f"{len(names)} names"


@asynccontextmanager
async def served(
    *contracts: tuple[jsonrpc.Contract[Any], Any], limits: jsonrpc.Limits | None = None
) -> AsyncIterator[jsonrpc.Server]:
    server = jsonrpc.Server(limits or jsonrpc.Limits())
    for contract, handler in contracts:
        server.register(contract, handler)
    await server.listen("127.0.0.1", 0)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def at(server: jsonrpc.Server) -> str:
    return f"127.0.0.1:{server.port}"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await scenario()

    asyncio.run(bounded())


async def until(met: Callable[[], Any]) -> None:
    while not met():  # noqa: ASYNC110 (a condition of many parts)
        await asyncio.sleep(0.001)


async def ask(server: jsonrpc.Server, sent: bytes) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**24)
    writer.write(sent)
    reply = json.loads(await reader.readline())
    writer.close()
    return reply


@pytest.mark.parametrize(
    "params",
    [b'"params":[],', b"", b'"params":null,', b'"params":{},', b'"params":[null],', b'"params":[{}],', b'"params":7,'],
)
def test_what_is_told_however_it_is_asked_for(params: bytes) -> None:
    async def scenario() -> None:
        async with served((HELLO, Hello())) as server:
            reply = await ask(server, b'{"method":"rpc.discover",%b"id":0}\n' % params)
        assert reply == {
            "id": 0,
            "result": {
                "openrpc": "1.3.2",
                "info": {"title": "hello", "version": "unversioned"},
                "methods": [
                    {
                        "name": "hello.HelloWorld",
                        "description": HELLO.methods["HelloWorld"].doc,
                        "paramStructure": "by-position",
                        "params": [{"name": "name", "required": True, "schema": {"type": "string"}}],
                        "result": {"name": "result", "schema": {"type": "string"}},
                        "x-idempotent": True,
                    }
                ],
            },
            "error": None,
        }

    run(scenario)


def test_methods_are_described_each_by_schemas_complete_in_themselves() -> None:
    async def scenario() -> None:
        async with served((PEOPLE, Handler()), (NAMES, Counter())) as server:
            count, find, odd, other = await jsonrpc.discover(at(server))
        assert [(each.service, each.name) for each in (count, find, odd, other)] == [
            ("a.b people", "Count"),
            ("a.b people", "Find"),
            ("a.b people", "Odd"),
            ("names", "Count"),
        ]
        assert (find.doc, find.idempotent) == ("Find people\nwho are like this one.", True)
        assert (count.doc, count.idempotent) == ("", False)
        takes, gives = Draft202012Validator(find.parameter), Draft202012Validator(find.result)
        child = {"name": "b", "children": [{"name": "c", "born": "2020-02-02"}]}
        assert takes.is_valid({"name": "a", "children": [child]})
        assert not takes.is_valid({"name": "a", "children": [{"born": None}]})
        assert gives.is_valid({"people": [child], "more": False})
        assert not gives.is_valid({"people": None})
        assert (odd.parameter, odd.result) == ({}, {"type": "string"}), "what has no schema may be anything"

    run(scenario)


def test_a_method_added_later_is_told_of() -> None:
    async def scenario() -> None:
        async with served((HELLO, Hello())) as server:
            assert len(await jsonrpc.discover(at(server))) == 1
            server.register(NAMES, Counter())
            assert len(await jsonrpc.discover(at(server))) == 2

    run(scenario)


def test_what_is_described_can_be_dialled() -> None:
    async def scenario() -> None:
        registry = MemoryRegistry()
        async with served((PEOPLE, Handler()), (NAMES, Counter())) as server:
            registry.register(Instance("p-1", "people", "127.0.0.1", server.port, tags=("public",)), TcpCheck())
            contract = jsonrpc.Contract.described("people", await jsonrpc.discover(at(server)))
            assert (contract.name, contract.methods["Find"].idempotent) == ("people", True)
            assert not contract.methods["Odd"].idempotent
            async with jsonrpc.dial(contract, tag="public", registry=registry) as people:
                person = {"name": "a", "born": "2020-02-02", "children": None}
                assert await people.Find(person) == {"people": [person], "more": False}
                assert await people.Odd(7) == "7"
                full = getattr(people, "a.b people.Find")
                assert await full({"name": "李白"}) == {
                    "people": [{"name": "李白", "born": None, "children": None}],
                    "more": False,
                }
                # Two services have a Count: neither has the bare name.
                assert not hasattr(people, "Count")
                assert await getattr(people, "names.Count")(["x"]) == "1 names"
                assert await getattr(people, "a.b people.Count")(["x"]) == 1
                with pytest.raises(jsonrpc.RemoteError, match=r"a.b people.Find: expected Person, found a string"):
                    await people.Find("a")
            assert jsonrpc.answered_by.get() == "p-1"

    run(scenario)


@pytest.mark.parametrize(("name", "methods"), [("", 1), ("people", 0)])
def test_a_described_contract_needs_a_name_and_methods(name: str, methods: int) -> None:
    described = [jsonrpc.Described("Find", "people", "", False, {}, {})] * methods  # noqa: FBT003
    with pytest.raises(ValueError, match="expected a name, and methods to call"):
        jsonrpc.Contract.described(name, described)


class Reserved(Protocol):
    async def Echo(self, text: str, /) -> str: ...


class Echo:
    async def Echo(self, text: str) -> str:
        return text


def test_the_name_of_rpc_s_own_is_taken() -> None:
    with pytest.raises(ValueError, match="expected one handler of 'rpc', found a second one"):
        jsonrpc.Server().register(jsonrpc.Contract("rpc", Reserved), Echo())


# --- limits, draining, telemetry: as for any other method -------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (jsonrpc.Limits(message=500), r"rpc.discover has a reply of \d+ bytes, of which 500 are allowed"),
        (jsonrpc.Limits(nesting=6), "rpc.discover has a reply of more than 6 levels of nesting"),
    ],
)
def test_what_would_be_beyond_the_limits_is_not_told(limits: jsonrpc.Limits, problem: str) -> None:
    async def scenario() -> None:
        async with served((PEOPLE, Handler()), limits=limits) as server:
            with pytest.raises(jsonrpc.JsonRpcError, match=problem):
                await jsonrpc.discover(at(server))

    run(scenario)


def test_the_caller_s_own_limits_hold() -> None:
    async def scenario() -> None:
        async with served((PEOPLE, Handler())) as server:
            with pytest.raises(jsonrpc.UnavailableError, match="expected at most 500 bytes in a message, found more"):
                await jsonrpc.discover(at(server), limits=jsonrpc.Limits(message=500))

    run(scenario)


def test_a_peer_that_asks_and_does_not_read_costs_no_more_than_another() -> None:
    async def scenario() -> None:
        async with served((PEOPLE, Handler()), limits=jsonrpc.Limits(idle=1.0)) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
            asked = b'{"method":"rpc.discover","id":1}' * 100
            with suppress(ConnectionError, TimeoutError):
                while True:  # until the server has stopped to read, and then closed
                    writer.write(asked)
                    async with asyncio.timeout(SECONDS / 2):
                        await writer.drain()
            await until(lambda: not server.connections)
            writer.close()

    run(scenario)


def test_a_server_that_goes_does_not_tell(caplog: pytest.LogCaptureFixture) -> None:
    class Waiting:
        def __init__(self) -> None:
            self.begun, self.go = asyncio.Event(), asyncio.Event()

        async def Echo(self, text: str) -> str:
            self.begun.set()
            await self.go.wait()
            return text

    async def scenario() -> None:
        waiting = Waiting()
        async with served((jsonrpc.Contract("trial", Reserved), waiting)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b'{"method":"trial.Echo","params":["x"],"id":1}')
            await waiting.begun.wait()
            stopping = asyncio.create_task(server.stop(SECONDS))
            await until(lambda: server.going)
            writer.write(b'{"method":"rpc.discover","params":[],"id":2}')
            assert json.loads(await reader.readline())["error"] == "rpc: rpc is going; call again elsewhere"
            waiting.go.set()
            assert json.loads(await reader.readline())["result"] == "x"
            await stopping
            writer.close()

    run(scenario)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_it_is_counted() -> None:
    async def scenario() -> None:
        telemetry = Telemetry("hello", "hello-1", "")
        async with served((HELLO, Hello())) as server:
            server.equip(telemetry)
            await jsonrpc.discover(at(server))
        counted = 'jsonrpc_server_handled_total{jsonrpc_code="OK",jsonrpc_method="discover",jsonrpc_service="rpc"} 1.0'
        assert counted in generate_latest(telemetry.metrics).decode()

    run(scenario)


# --- servers that are not ours ----------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    """Yield the address of a server that has one reply to everything."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(reply)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def result(document: Any) -> bytes:
    return json.dumps({"id": 1, "result": document, "error": None}).encode()


def telling(**changes: Any) -> bytes:
    method = {"name": "a.B", "params": [{"name": "p", "schema": {}}], "result": {"name": "r", "schema": {}}}
    return result({"openrpc": "1.3.2", "methods": [{**method, **changes}]})


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (
            b'{"id":1,"result":null,"error":"rpc: can\'t find service rpc.discover"}',
            "does not tell what it can be called by, to rpc.discover: rpc: can't find service rpc.discover",
        ),
        (
            b'{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"Method not found"}}',
            "does not tell what it can be called by, to rpc.discover: {'code': -32601, 'message': 'Method not found'}",
        ),
        (result(None), "answers rpc.discover with what is no OpenRPC document: expected Document, found null"),
        (result({"methods": {}}), "with what is no OpenRPC document"),
        (telling(name=None), "with what is no OpenRPC document"),
        (telling(params=[{"$ref": "#/x"}]), "with what is no OpenRPC document"),
        (telling(**{"x-idempotent": "yes"}), "with what is no OpenRPC document"),
        (result({"methods": []}), "tells of no method that can be called, in its answer to rpc.discover"),
        (telling(name="B"), "tells of no method that can be called"),
        (telling(name="a.b c"), "tells of no method that can be called"),
        (telling(name="a\0.B"), "tells of no method that can be called"),
        (telling(name="a.__init__"), "tells of no method that can be called"),
        (telling(params=[]), "tells of no method that can be called"),
        (b"220 welcome\r\n", "has sent what is no reply"),
    ],
)
def test_a_server_that_does_not_tell(reply: bytes, problem: str) -> None:
    async def scenario() -> None:
        async with answering(reply) as address:
            with pytest.raises(jsonrpc.JsonRpcError) as caught:
                await jsonrpc.discover(address)
        assert address in str(caught.value)
        assert problem in str(caught.value)

    run(scenario)


def test_the_least_that_a_server_has_to_tell() -> None:
    async def scenario() -> None:
        async with answering(telling()) as address:
            assert await jsonrpc.discover(address) == [jsonrpc.Described("B", "a", "", False, {}, {})]  # noqa: FBT003

    run(scenario)


def test_nobody_is_there_or_nobody_answers() -> None:
    async def scenario() -> None:
        with pytest.raises(jsonrpc.UnavailableError, match="no connection to 127"):
            await jsonrpc.discover(f"127.0.0.1:{free_port()}")
        async with answering(b"") as address:
            with pytest.raises(jsonrpc.DeadlineExceededError, match=r"rpc.discover was not answered by .* in 0.3 s"):
                await jsonrpc.discover(address, deadline=0.3)

    run(scenario)
