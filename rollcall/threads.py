"""Threads that nothing waits for at the end of the process."""

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any


class DaemonThreads(futures.ThreadPoolExecutor):
    """Runs each call on a daemon thread of its own, at once. What runs cannot be cancelled, but may be left alone."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "futures.Future[Any]":
        """Return the future of a call that is under way."""
        future: futures.Future[Any] = futures.Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 (handed on, as the base class does)
                future.set_exception(error)

        threading.Thread(target=run, name=self._thread_name_prefix, daemon=True).start()
        return future
