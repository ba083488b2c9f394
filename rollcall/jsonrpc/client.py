"""`connect`: the methods of a contract at one address, called like local functions; the errors are in `errors`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

from rollcall import context as contexts
from rollcall.jsonrpc.contract import BadValueError, Contract, Method
from rollcall.jsonrpc.errors import DeadlineExceededError, JsonRpcError, RemoteError, UnavailableError
from rollcall.jsonrpc.wire import AGAIN, ELSEWHERE, LIMITS, Limits, MalformedError, Splitter, parse, shortened, too_much

T = TypeVar("T")

CONNECT_SECONDS = 2.0


@asynccontextmanager
async def connect(
    address: str, contract: Contract[T], *, deadline: float = 5.0, limits: Limits = LIMITS
) -> AsyncIterator[T]:
    """Connect to the server at HOST:PORT, and yield its methods.

        async with jsonrpc.connect("127.0.0.1:8999", HELLO) as hello:
            print(await hello.HelloWorld("李白"))

    A call gets `deadline` seconds, and never more than the call it is made for has left. Raises `UnavailableError` when
    there is no server; so does each call once the connection is broken. To find servers, and another when one goes:
    `dial`.
    """
    connection = await Connection.open(address, limits)

    async def call(method: Method, argument: Any) -> Any:
        request = method.request(argument)
        seconds = time_for(deadline)
        try:
            async with asyncio.timeout(seconds):
                return await connection.call(method, request)
        except TimeoutError:
            raise DeadlineExceededError(f"{method.path} was not answered by {address} in {seconds:.3g} s") from None

    try:
        yield client(contract, call)
    finally:
        connection.close()


def client(contract: Contract[T], call: Callable[[Method, Any], Awaitable[Any]]) -> T:
    """Return an object with the methods of a contract, each of which makes a call."""

    def bound(method: Method) -> Callable[[Any], Awaitable[Any]]:
        async def invoke(argument: Any, /) -> Any:
            return await call(method, argument)

        invoke.__name__, invoke.__qualname__, invoke.__doc__ = method.name, method.path, method.doc
        return invoke

    methods = {name: staticmethod(bound(method)) for name, method in contract.methods.items()}
    made: Any = type(contract.name, (), methods)()
    return made  # type: ignore[no-any-return]  # made of the contract's methods, it is what the contract describes


def time_for(deadline: float) -> float:
    """Return the seconds that a call gets: no more than the call that it is made for, if it is, has left.

    Raises `DeadlineExceededError` when that has none: a server that was called all the same would seem to hang.
    """
    handled = contexts.current.get()
    left = handled.remaining() if handled else None
    if left == 0:
        raise DeadlineExceededError("no time is left of the call that this one was to be made for")
    return deadline if left is None else min(deadline, left)


class Connection(asyncio.Protocol):
    """One connection to a server, and the calls in flight on it."""

    def __init__(self, address: str, limits: Limits = LIMITS) -> None:
        self.address = address
        self.leaving = False
        """Whether the server has said that it takes no more calls."""
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done when the connection is closed; says why."""
        self._limits = limits
        self._splitter = Splitter(limits)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._problem = ""
        self._closing = False

    @classmethod
    async def open(cls, address: str, limits: Limits = LIMITS) -> Self:
        """Connect to HOST:PORT, an IPv6 address in brackets. Raises `UnavailableError` when nobody listens there."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(lambda: cls(address, limits), host.strip("[]"), int(port))
        except TimeoutError:
            raise UnavailableError(f"{address} did not accept a connection in {CONNECT_SECONDS:g} s") from None
        except (OSError, ValueError) as error:  # the latter for what is no port, or no name of a host
            raise UnavailableError(f"no connection to {address}: {error}") from None
        return connection

    @property
    def usable(self) -> bool:
        """Whether a call may be made on it."""
        return not (self.leaving or self._closing or self._transport.is_closing())

    async def call(self, method: Method, request: bytes) -> Any:
        """Send a request, as `Method.request` has begun it, and return its result.

        Raises `RemoteError` for an error that the server has answered with, `UnavailableError` when the connection
        breaks or the server is going, `JsonRpcError` for a request or a reply that goes beyond the limits or the
        contract.
        """
        await self._writable.wait()
        if not self.usable:
            raise UnavailableError(self._problem or f"the connection to {self.address} is closed")
        self._last_id += 1
        number = self._last_id
        message = b'%b],"id":%d}\n' % (request, number)
        if problem := too_much(message, self._limits):
            raise JsonRpcError(f"{method.path} cannot be called with a request of {problem}")
        waiting = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(message)
            reply = await waiting
        finally:
            self._pending.pop(number, None)  # a reply that comes later is nobody's
            self._close_if_over()
        return self._result(method, reply)

    def close(self, *, gently: bool = False) -> None:
        """Close, at once or, `gently`, when the calls in flight are over. No more can be made."""
        self._closing = True
        self._writable.set()
        if not gently:
            self._problem = self._problem or f"the connection to {self.address} was closed by this side"
            self._transport.close()
        self._close_if_over()

    # What the event loop tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the way to write."""
        self._transport: Any = transport

    def pause_writing(self) -> None:
        """Hold further calls back: the server does not read."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let the calls that were held back go on."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Hand the replies that are whole to their calls."""
        self._splitter.feed(data)
        try:
            while (message := self._splitter.next()) is not None:
                self._take(parse(message))
        except MalformedError as error:
            self._problem = f"{self.address} has sent what is no reply: {error}"
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the calls in flight."""
        reason = self._problem or f"{self.address} has closed the connection" + (f": {exc}" if exc else "")
        self._problem = reason
        ran = not reason.endswith(ELSEWHERE)
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError(reason, may_have_run=ran))
        self._writable.set()
        if not self.lost.done():
            self.lost.set_result(reason)

    # Replies.

    def _take(self, reply: dict[str, Any]) -> None:
        """Hand a reply to the call that waits for it."""
        number = reply.get("id")
        if number is None and reply.get("error"):  # not about a call: the server is about to close the connection
            self._problem = f"{self.address}: {_text(reply['error'])}"
            self.leaving = True
        elif type(number) is int and (waiting := self._pending.get(number)) and not waiting.done():
            waiting.set_result(reply)

    def _result(self, method: Method, reply: dict[str, Any]) -> Any:
        error = reply.get("error")
        if error is not None:
            text = _text(error)
            if text.endswith((ELSEWHERE, AGAIN)):
                self.leaving = True
                raise UnavailableError(f"{self.address}: {text}", may_have_run=text.endswith(AGAIN))
            raise RemoteError(text)
        try:
            return method.result.decode(reply.get("result"))
        except BadValueError as problem:
            raise JsonRpcError(f"{method.path} was answered by {self.address} with a bad result: {problem}") from None

    def _close_if_over(self) -> None:
        if self._closing and not self._pending:
            self._transport.close()


def _text(error: object) -> str:
    """Return an error as text, which it is when it comes from Go or from here."""
    return error if isinstance(error, str) else shortened(repr(error))
