"""An HTTP client: `python -m bench.requester PORT` posts additions for as long as it is told.

It reads seconds, a line each, and answers with how many requests were answered with 999 in them. It does no more than
has to be done to count answers, so that it can keep a server busy from one core.
"""

import asyncio
import json
import sys
import time

CONNECTIONS = 16
BODY = b'{"num1": 333, "num2": 666}'
REQUEST = (
    b"POST /v1/sum/Add HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
)


async def main(port: str) -> None:
    connections = [await asyncio.open_connection("127.0.0.1", int(port)) for _ in range(CONNECTIONS)]

    async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> int:
        calls = 0
        while time.monotonic() < until:
            writer.write(REQUEST % (len(BODY), BODY))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            calls += json.loads(body) == {"res": "999"}
        return calls

    while line := await asyncio.to_thread(sys.stdin.readline):
        until = time.monotonic() + float(line)
        calls = await asyncio.gather(*(post(*each, until) for each in connections))
        print(json.dumps(sum(calls)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
