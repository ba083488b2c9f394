"""The plain HTTP port: /metrics for Prometheus, /livez and /readyz for whoever asks by HTTP, and /settings."""

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

ALIVE_WITHIN = 1.0  # seconds that the event loop may take to answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # whoever has asked does not wait any more
            super().handle_error(request, client_address)


def _alive(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(ALIVE_WITHIN)
    except FutureTimeoutError:
        return False
    return True


class Probes:
    """Serves the probes from threads of its own, so that an event loop which hangs can be seen to hang."""

    def __init__(
        self,
        address: tuple[str, int],
        metrics: CollectorRegistry,
        ready: Callable[[], bool],
        settings: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds a client may take over its request

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
                        self.answer(200, encoder(metrics), content_type)
                    case "/livez":
                        self.probe("alive", passes=_alive(loop))
                    case "/readyz":
                        self.probe("ready", passes=ready())
                    case "/settings":
                        self.answer(
                            200, json.dumps(settings(), ensure_ascii=False, default=str).encode(), "application/json"
                        )
                    case _:
                        self.answer(404, b"expected /metrics, /livez, /readyz or /settings\n")

            def probe(self, what: str, *, passes: bool) -> None:
                self.answer(200 if passes else 503, f"{'' if passes else 'not '}{what}\n".encode())

            def answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Stay quiet: probes come every second."""

        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET

        self._server = Server(address, Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
