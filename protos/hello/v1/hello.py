"""The contract of hello: JSON-RPC has no language for contracts but the one it is written in."""

from typing import Protocol

from rollcall import jsonrpc


class Hello(Protocol):
    """Greets, in Chinese."""

    @jsonrpc.idempotent
    async def HelloWorld(self, name: str, /) -> str:
        """Return the name with " 你好" after it."""
        ...


HELLO = jsonrpc.Contract("hello", Hello)
"""What servers register an object under, and clients call it by: `hello.HelloWorld`, as Go's net/rpc names it."""
