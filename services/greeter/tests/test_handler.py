"""greeter, over the wire."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from services.greeter.handler import MOST, Greeter

T = TypeVar("T")
Stub: TypeAlias = "greeter_pb2_grpc.GreeterServiceAsyncStub"  # which is there for the types alone


def served(call: Callable[[Stub], Awaitable[T]]) -> T:
    """Return what `call` returns, given a stub of a greeter."""

    async def run() -> T:
        server = grpc.aio.server()
        greeter_pb2_grpc.add_GreeterServiceServicer_to_server(Greeter(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await call(greeter_pb2_grpc.GreeterServiceStub(channel))
        finally:
            await server.stop(None)

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["李白", "", "n" * 100_000])
def test_call(name: str) -> None:
    async def call(stub: Stub) -> str:
        return (await stub.Call(greeter_pb2.CallRequest(name=name))).msg

    assert served(call) == f"Hello {name}"


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_client_stream(count: int) -> None:
    async def call(stub: Stub) -> int:
        answer = await stub.ClientStream(greeter_pb2.ClientStreamRequest(stroke=7) for _ in range(count))
        return answer.count

    assert served(call) == count


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_server_stream(count: int) -> None:
    async def call(stub: Stub) -> list[int]:
        return [each.count async for each in stub.ServerStream(greeter_pb2.ServerStreamRequest(count=count))]

    assert served(call) == list(range(count))


@pytest.mark.parametrize("count", [-1, MOST + 1, -(2**63), 2**63 - 1])
def test_a_server_stream_of_a_bad_count_is_refused(count: int) -> None:
    async def call(stub: Stub) -> list[int]:
        return [each.count async for each in stub.ServerStream(greeter_pb2.ServerStreamRequest(count=count))]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        served(call)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # it has what is asked of it
    assert status is not None
    refused = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(refused)
    (violation,) = refused.field_violations
    assert (violation.field, violation.description) == ("count", f"must be from 0 to {MOST}, found {count}")


@pytest.mark.parametrize("strokes", [[], [0], [3, -1, 2**63 - 1]])
def test_bidi_stream(strokes: list[int]) -> None:
    async def call(stub: Stub) -> list[int]:
        asked = (greeter_pb2.BidiStreamRequest(stroke=stroke) for stroke in strokes)
        return [each.stroke async for each in stub.BidiStream(asked)]

    assert served(call) == strokes


def test_a_bidi_stream_answers_each_stroke_before_the_next_one_comes() -> None:
    async def call(stub: Stub) -> list[int]:
        answers = list[int]()
        answered = asyncio.Semaphore()

        async def strokes() -> AsyncIterator[greeter_pb2.BidiStreamRequest]:
            for stroke in range(10):
                await answered.acquire()
                yield greeter_pb2.BidiStreamRequest(stroke=stroke)

        async for each in stub.BidiStream(strokes(), timeout=10):
            answers.append(each.stroke)
            answered.release()
        return answers

    assert served(call) == list(range(10))
