"""A caller of its own process: reads a stream of greeter's to its end, and waits.

`python -m tests.integration.reader COUNT`; it writes a line after each tenth of the messages.
"""

import asyncio
import sys

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc


async def main(count: int) -> None:
    async with rollcall.dial("greeter") as channel:
        stream = greeter_pb2_grpc.GreeterServiceStub(channel).ServerStream(greeter_pb2.ServerStreamRequest(count=count))
        read = 0
        async for message in stream:
            assert message.count == read
            read += 1
            if read % (count // 10) == 0:
                print(read, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until its memory has been looked at


asyncio.run(main(int(sys.argv[1])))
