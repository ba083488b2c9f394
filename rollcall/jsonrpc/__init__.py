"""JSON-RPC 1.0 over plain TCP, wire-compatible with Go's net/rpc/jsonrpc, typed at both ends.

A contract is a Protocol class. A server answers it with an object that has its methods; a client calls the methods:

    class Hello(Protocol):
        @jsonrpc.idempotent
        async def HelloWorld(self, name: str, /) -> str: ...

    HELLO = jsonrpc.Contract("hello", Hello)

    service = jsonrpc.Service("hello")  # or jsonrpc.Server(), for one that does not register itself
    service.register(HELLO, Handler())
    service.run()

    async with jsonrpc.dial(HELLO) as hello:  # or jsonrpc.connect("HOST:PORT", HELLO)
        print(await hello.HelloWorld("李白"))
"""

from rollcall.jsonrpc.client import connect
from rollcall.jsonrpc.contract import Contract, Described, idempotent
from rollcall.jsonrpc.dial import answered_by, dial
from rollcall.jsonrpc.discover import discover
from rollcall.jsonrpc.errors import (
    DeadlineExceededError,
    JsonRpcError,
    RefusedError,
    RemoteError,
    UnavailableError,
)
from rollcall.jsonrpc.server import Server
from rollcall.jsonrpc.service import Service
from rollcall.jsonrpc.wire import Limits

__all__ = [
    "Contract",
    "DeadlineExceededError",
    "Described",
    "JsonRpcError",
    "Limits",
    "RefusedError",
    "RemoteError",
    "Server",
    "Service",
    "UnavailableError",
    "answered_by",
    "connect",
    "dial",
    "discover",
    "idempotent",
]
