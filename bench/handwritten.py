"""What the gateway is measured beside: `python -m bench.handwritten HOST:PORT` serves sum's Add by HTTP.

It is what one writes by hand for one method of one service at one address: FastAPI, a model of the request and of the
answer, and a bare channel. It has uvicorn's usual speed-ups, and its log line for each request.
"""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

from contracts.sum.v1 import sum_pb2, sum_pb2_grpc

DEADLINE = 5.0  # seconds, as the gateway gives


class AddRequest(BaseModel):
    num1: int = 0
    num2: int = 0


class AddResponse(BaseModel):
    res: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        app.state.sums = sum_pb2_grpc.SumServiceStub(channel)
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/sum/Add")
async def add(message: AddRequest, request: Request) -> AddResponse:
    sums: sum_pb2_grpc.SumServiceAsyncStub = request.app.state.sums
    reply = await sums.Add(sum_pb2.AddRequest(num1=message.num1, num2=message.num2), timeout=DEADLINE)
    return AddResponse(res=str(reply.res))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(app, loop="uvloop", http="httptools")
        # Its lines go where the gateway's go; standard output is for the port.
        config.log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"  # type: ignore[index]
        config.configure_logging()
        uvicorn.Server(config).run([listening])
