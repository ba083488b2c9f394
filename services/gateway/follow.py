"""Following a registry from an event loop: its watches block, so each is read on a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import TypeVar

from rollcall.registry import Watch

T = TypeVar("T")


async def follow(watch: Watch[T]) -> AsyncGenerator[T, None]:
    """Yield what a watch yields, the newest of it: what has been overtaken by then is passed over.

    Ends the watch when it is closed: use `contextlib.aclosing`.
    """
    loop = asyncio.get_running_loop()
    newest: list[T] = []
    changed = asyncio.Event()

    def take(value: T) -> None:
        newest[:] = [value]
        changed.set()

    def read() -> None:
        for value in watch:
            try:
                loop.call_soon_threadsafe(take, value)
            except RuntimeError:  # the loop has been closed
                return

    threading.Thread(target=read, name="follow", daemon=True).start()
    try:
        while True:
            await changed.wait()
            changed.clear()
            yield newest[0]
    finally:
        watch.close()
