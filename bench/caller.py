"""A caller: `python -m bench.caller bare HOST:PORT` or `... dialled SERVICE`; makes calls for as long as it is told.

It reads seconds, a line each, and answers with how many calls it made in them and what CPU time its process used.
"""

import asyncio
import json
import sys
import time

import grpc.aio

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc

TASKS = 16
DEADLINE = 5.0  # seconds; what a dialled call gets by default, so that a bare one pays for a deadline as well


async def main(kind: str, target: str) -> None:
    bare = kind == "bare"
    async with grpc.aio.insecure_channel(target) if bare else rollcall.dial(target) as channel:
        add = sum_pb2_grpc.SumServiceStub(channel).Add

        async def call(until: float) -> int:
            calls = 0
            while time.monotonic() < until:
                request = sum_pb2.AddRequest(num1=333, num2=666)
                reply = await (add(request, timeout=DEADLINE) if bare else add(request))
                calls += reply.res == 999
            return calls

        while line := await asyncio.to_thread(sys.stdin.readline):
            cpu, until = time.process_time(), time.monotonic() + float(line)
            calls = sum(await asyncio.gather(*(call(until) for _ in range(TASKS))))
            print(json.dumps({"calls": calls, "cpu": time.process_time() - cpu}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
