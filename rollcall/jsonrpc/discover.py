"""`discover`: what a server can be called by, as it tells itself.

Every `Server` answers `rpc.discover`, the method that OpenRPC reserves for this, with an OpenRPC document.

https://spec.open-rpc.org
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from rollcall.jsonrpc.client import connect
from rollcall.jsonrpc.contract import BadValueError, Contract, Described, Method, Value
from rollcall.jsonrpc.errors import JsonRpcError, RemoteError
from rollcall.jsonrpc.wire import LIMITS, Limits

OPENRPC = "1.3.2"


class Discovery(Protocol):
    """What every server answers beside its own contracts."""

    async def discover(self, anything: Any, /) -> Any:
        """Return an OpenRPC document. What it is asked with is not looked at."""


DISCOVERY = Contract("rpc", Discovery)


async def discover(address: str, *, deadline: float = 5.0, limits: Limits = LIMITS) -> list[Described]:
    """Ask the server at HOST:PORT for the methods that it can be called by, at least one, and return them by name.

        said = await jsonrpc.discover("127.0.0.1:8999")
        contract = jsonrpc.Contract.described("hello", said)

    It has `deadline` seconds to answer. Raises `UnavailableError` when there is no server, and another `JsonRpcError`
    when it does not tell, as one that is not ours may not. Methods that a `Contract` cannot have are left out.
    """
    async with connect(address, DISCOVERY, deadline=deadline, limits=limits) as server:
        try:
            document: Document = _DOCUMENT.decode(await server.discover(None))
        except RemoteError as error:
            raise JsonRpcError(f"{address} does not tell what it can be called by, to rpc.discover: {error}") from None
        except BadValueError as problem:
            raise JsonRpcError(f"{address} answers rpc.discover with what is no OpenRPC document: {problem}") from None
    if found := [described for method in document.methods if (described := method.described())]:
        return sorted(found, key=lambda each: (each.service, each.name))
    raise JsonRpcError(f"{address} tells of no method that can be called, in its answer to rpc.discover")


def document(methods: Iterable[Method]) -> dict[str, Any]:
    """Return the OpenRPC document of methods.

    Each of its schemas is complete in itself: what it refers to is in its own `$defs`.
    """
    told = sorted(methods, key=lambda method: method.path)
    return {
        "openrpc": OPENRPC,
        "info": {"title": ", ".join(sorted({method.service for method in told})), "version": "unversioned"},
        "methods": [
            {
                "name": method.path,
                "description": method.doc,
                "paramStructure": "by-position",
                "params": [
                    {"name": method.parameter_name, "required": True, "schema": method.parameter.schema("validation")}
                ],
                "result": {"name": "result", "schema": method.result.schema("serialization")},
                "x-idempotent": method.idempotent,
            }
            for method in told
        ],
    }


@dataclass
class _Content:
    schema: dict[str, Any]


@dataclass
class _Method:
    name: str
    params: list[_Content]
    result: _Content
    description: str = ""
    idempotent: Annotated[bool, Field(alias="x-idempotent")] = False

    def described(self) -> Described | None:
        """Return it as part of a contract; None where it cannot be."""
        service, _, name = self.name.rpartition(".")
        fits = name.isidentifier() and not name.startswith("_") and service and service.isprintable()
        if not fits or len(self.params) != 1:
            return None
        return Described(name, service, self.description, self.idempotent, self.params[0].schema, self.result.schema)


@dataclass
class Document:
    """As much of an OpenRPC document as is looked at."""

    methods: list[_Method]


_DOCUMENT = Value(Document)
