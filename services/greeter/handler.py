"""What greeter does.

A stream needs no queue here, and has none: each message is awaited out before the next is made or asked for, and gRPC
lets that wait for as long as the other side does not read. So a slow reader holds its sender back.
"""

from collections.abc import AsyncIterator
from typing import Any

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc

MOST = 10_000_000


class Greeter(greeter_pb2_grpc.GreeterServiceServicer):
    """Greets, and has a stream of each kind."""

    async def Call(self, request: greeter_pb2.CallRequest, _: Any) -> greeter_pb2.CallResponse:
        """Greet."""
        return greeter_pb2.CallResponse(msg=f"Hello {request.name}")

    async def ClientStream(
        self, strokes: AsyncIterator[greeter_pb2.ClientStreamRequest], _: Any
    ) -> greeter_pb2.ClientStreamResponse:
        """Return how many strokes have come."""
        count = 0
        async for _stroke in strokes:
            count += 1
        return greeter_pb2.ClientStreamResponse(count=count)

    async def ServerStream(
        self, request: greeter_pb2.ServerStreamRequest, context: Any
    ) -> AsyncIterator[greeter_pb2.ServerStreamResponse]:
        """Count from 0 up to, and without, the number asked for."""
        if not 0 <= request.count <= MOST:
            await rollcall.refuse(context, {"count": f"must be from 0 to {MOST}, found {request.count}"})
        for count in range(request.count):
            yield greeter_pb2.ServerStreamResponse(count=count)

    async def BidiStream(
        self, strokes: AsyncIterator[greeter_pb2.BidiStreamRequest], _: Any
    ) -> AsyncIterator[greeter_pb2.BidiStreamResponse]:
        """Answer each stroke with the same."""
        async for each in strokes:
            yield greeter_pb2.BidiStreamResponse(stroke=each.stroke)
