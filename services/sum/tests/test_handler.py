"""sum, over the wire."""

import asyncio

import grpc.aio
import pytest

from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from services.sum.handler import Sum

LEAST, MOST = -(2**31), 2**31 - 1


@pytest.mark.parametrize(
    ("num1", "num2", "res"),
    [
        (333, 666, 999),
        (0, 0, 0),
        (-1, 1, 0),
        (MOST, MOST, 2**32 - 2),
        (LEAST, LEAST, -(2**32)),
        (MOST, LEAST, -1),
    ],
)
def test_add(num1: int, num2: int, res: int) -> None:
    async def call() -> int:
        server = grpc.aio.server()
        sum_pb2_grpc.add_SumServiceServicer_to_server(Sum(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = await sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=num1, num2=num2))
        await server.stop(None)
        return answer.res

    assert asyncio.run(call()) == res
