"""An HTTP service that is none of ours: says hello, waits, and streams."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rollcall import web


async def hello(_: Request) -> Response:
    return PlainTextResponse("hello")


async def wait(request: Request) -> Response:
    await asyncio.sleep(float(request.path_params["seconds"]))
    return PlainTextResponse("done")


async def stream(request: Request) -> Response:
    async def events() -> AsyncIterator[str]:
        yield "data: first\n\n"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not request.scope["rollcall"].ending.is_set():
                raise
            yield "data: last\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@asynccontextmanager
async def app(_: web.Settings) -> AsyncIterator[Starlette]:
    yield Starlette(routes=[Route("/hello", hello), Route("/wait/{seconds}", wait), Route("/stream", stream)])


if __name__ == "__main__":
    web.Service("front", app).run()
