"""The bare server: `python -m bench.bare` serves the handlers of sum and greeter with nothing of Rollcall around them.

With the word `uvloop` behind it, it runs on the event loop that Rollcall's instances run on.
"""

import asyncio
import sys

import grpc.aio
import uvloop

from contracts.greeter.v1 import greeter_pb2_grpc
from contracts.sum.v1 import sum_pb2_grpc
from services.greeter.handler import Greeter
from services.sum.handler import Sum


async def main() -> None:
    server = grpc.aio.server()
    sum_pb2_grpc.add_SumServiceServicer_to_server(Sum(), server)
    greeter_pb2_grpc.add_GreeterServiceServicer_to_server(Greeter(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if "uvloop" in sys.argv else None) as runner:
        runner.run(main())
