"""hello without a registry: `python -m tests.unit.jsonrpc_hello '{"idle": 1}'`. Takes limits, prints its port."""

import asyncio
import json
import logging
import sys

import uvloop

from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc
from services.hello.handler import Hello


async def main(limits: jsonrpc.Limits) -> None:
    server = jsonrpc.Server(limits)
    server.register(HELLO, Hello())
    port = await server.listen("127.0.0.1", 0)
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(jsonrpc.Limits(**json.loads(sys.argv[1]))))
