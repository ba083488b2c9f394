"""A load of streams: `python -m bench.streamer HOST:PORT`; opens streams of a kind for as long as it is told.

It reads a kind and seconds as lines of JSON, and answers each with how many messages have passed; a stroke and its
answer count as one.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import uvloop

from bench.price import TRACEPARENT
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc

STREAMS = 4  # at once
MESSAGES = 1000  # of a stream
METADATA = (("traceparent", TRACEPARENT),)


async def client_stream(stub: Any) -> int:
    strokes = (greeter_pb2.ClientStreamRequest(stroke=stroke) for stroke in range(MESSAGES))
    answer = await stub.ClientStream(strokes, metadata=METADATA)
    return int(answer.count)


async def server_stream(stub: Any) -> int:
    request = greeter_pb2.ServerStreamRequest(count=MESSAGES)
    return sum([1 async for _ in stub.ServerStream(request, metadata=METADATA)])


async def bidi_stream(stub: Any) -> int:
    strokes = (greeter_pb2.BidiStreamRequest(stroke=stroke) for stroke in range(MESSAGES))
    return sum([1 async for _ in stub.BidiStream(strokes, metadata=METADATA)])


KINDS: dict[str, Callable[[Any], Awaitable[int]]] = {
    "client_stream": client_stream,
    "server_stream": server_stream,
    "bidi_stream": bidi_stream,
}


async def main(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = greeter_pb2_grpc.GreeterServiceStub(channel)

        async def stream(kind: str, until: float) -> int:
            messages = 0
            while time.monotonic() < until:
                came = await KINDS[kind](stub)
                if came != MESSAGES:
                    raise RuntimeError(f"expected {MESSAGES} messages of a {kind}, found {came}")
                messages += came
            return messages

        while line := await asyncio.to_thread(sys.stdin.readline):
            kind, seconds = json.loads(line)
            until = time.monotonic() + seconds
            print(sum(await asyncio.gather(*(stream(kind, until) for _ in range(STREAMS)))), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
