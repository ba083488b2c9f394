"""`Server`: answers JSON-RPC calls over TCP, as Go's net/rpc/jsonrpc does.

Where Go has a text for what is wrong with a request, it is Go's text. Calls of one connection run side by side and are
answered as they end. What is not JSON gets an error, and its connection is closed once the calls before it are
answered.

Nothing here queues without bound. A connection is read only while it has less than `Limits.calls` calls in flight and
its peer reads the replies; so it costs at most that many times `Limits.message` bytes for requests, and as much again
for replies. All connections together may cost `Limits.connections` times that: a bound, but with the limits as they are
one that is beyond most machines.
"""

import asyncio
import logging
from typing import Any, TypeVar

from pydantic_core import to_json

from rollcall import context as contexts
from rollcall.jsonrpc import contract as contracts
from rollcall.jsonrpc.contract import BadValueError, Contract
from rollcall.jsonrpc.discover import DISCOVERY, document
from rollcall.jsonrpc.errors import RefusedError
from rollcall.jsonrpc.wire import AGAIN, ELSEWHERE, LIMITS, Limits, MalformedError, Splitter, parse, shortened, too_much
from rollcall.telemetry import JSONRPC_CODES, Telemetry
from rollcall.telemetry import Method as Meter

T = TypeVar("T")
log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that may wait to be accepted
LAST_WORD = 1.0  # seconds that calls which outlive the grace have to tell their callers so


class Server:
    """Answers the calls of contracts.

    server = jsonrpc.Server()
    server.register(HELLO, Hello())
    port = await server.listen("127.0.0.1", 0)
    await server.start()
    ...
    await server.stop(grace=20)
    """

    port = 0

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.methods: dict[str, _Method] = {}
        self.services: set[str] = set()
        self.connections: set[_Connection] = set()
        self.going = False
        self._empty = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._document: dict[str, Any] = {}
        self.register(DISCOVERY, self)

    def register(self, contract: Contract[T], handler: T) -> None:
        """Have the calls of a contract answered by an object with its methods.

        Raises TypeError, naming all that differs, for an object that is not what the contract asks for (mypy says so
        earlier), and ValueError when the contract's name is taken.
        """
        if differences := contract.differences(handler):
            raise TypeError(f"expected a handler of {contract.name!r}, found {handler!r}: {'; '.join(differences)}")
        if contract.name in self.services:
            raise ValueError(f"expected one handler of {contract.name!r}, found a second one: {handler!r}")
        self.services.add(contract.name)
        for method in contract.methods.values():
            self.methods[method.path] = _Method(contract.name, method, getattr(handler, method.name))
        self._document = {}

    async def discover(self, _: Any) -> Any:
        """Answer `rpc.discover`. See `rollcall.jsonrpc.discover`."""
        if not self._document:  # schemas take some milliseconds, of which a peer should not have as many as it likes
            own = [method.agreed for method in self.methods.values() if method.service != DISCOVERY.name]
            self._document = document(own)
        return self._document

    async def listen(self, host: str, port: int) -> int:
        """Take an address, port 0 for any that is free, and return the port. Raises OSError for one that is taken."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Connection(self, loop), host, port, backlog=BACKLOG, start_serving=False
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        return self.port

    def equip(self, telemetry: Telemetry) -> None:
        """Count the calls of each method there."""
        for method in self.methods.values():
            method.meter = telemetry.jsonrpc(method.service, method.agreed.name)

    async def start(self) -> None:
        """Answer calls from now on."""
        if not self._listener:
            raise RuntimeError("expected listen() before start()")
        await self._listener.start_serving()
        self._sweep()

    async def tell(self, *, process: bool, services: bool) -> None:
        """Do nothing: JSON-RPC has no way to ask for a server's health."""

    async def quiet(self, patience: float) -> None:
        """Do nothing: a call that comes too late is refused, and its caller makes it elsewhere."""

    async def stop(self, grace: float) -> None:
        """Refuse new connections and calls, finish the calls in flight within `grace` seconds, and end the others."""
        self.going = True
        if self._listener:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.leave()
        if not await self._emptied(grace):
            for connection in tuple(self.connections):
                connection.end_calls()
            if not await self._emptied(LAST_WORD):  # peers that do not read
                for connection in tuple(self.connections):
                    connection.abort()
        if self._sweeper:
            self._sweeper.cancel()

    def admit(self, connection: "_Connection") -> bool:
        """Count a connection in; say no when there are too many."""
        if len(self.connections) >= self.limits.connections:
            return False
        self.connections.add(connection)
        return True

    def dismiss(self, connection: "_Connection") -> None:
        """Count a connection out."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    async def _emptied(self, seconds: float) -> bool:
        """Wait until all connections are closed; say whether they are in time."""
        self._empty.clear()
        try:
            async with asyncio.timeout(seconds):
                while self.connections:
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _sweep(self) -> None:
        """Look at all connections now and then: cheaper than a timer for each that every message would set anew."""
        loop = asyncio.get_running_loop()
        for connection in tuple(self.connections):
            connection.look(loop.time())
        self._sweeper = loop.call_later(min(1.0, self.limits.idle / 4, self.limits.slow / 4), self._sweep)


class _Method:
    """A method that can be called here."""

    def __init__(self, service: str, agreed: contracts.Method, function: Any) -> None:
        self.service, self.agreed, self.function = service, agreed, function
        # Without telemetry the counts go nowhere; calls are logged all the same.
        self.meter = Meter(agreed.path, (service, agreed.name), JSONRPC_CODES)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._limits, self._loop = server, server.limits, loop
        self._splitter = Splitter(server.limits)
        self._calls: set[asyncio.Task[None]] = set()
        self._reading = True
        self._ended = False  # nothing more will come, or nothing that could be read
        self._exhausted = True  # of what has come, nothing whole is left to be answered
        self._held_back = False  # by a peer that does not read
        self._lost = False
        self._active = loop.time()  # when it last did something for either side
        self._begun: float | None = None  # when the message began that has not ended

    # What the event loop tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        if not self._server.admit(self):
            most = self._limits.connections
            self._reply_error(b"null", f"rpc: more than {most} connections; {ELSEWHERE}")
            self._ended = True
            transport.close()
        elif self._server.going:  # it was accepted as stop() began, which has not seen it
            self.leave()

    def data_received(self, data: bytes) -> None:
        self._splitter.feed(data)
        self._advance()

    def eof_received(self) -> bool:
        self._ended = True
        self._advance()
        return True  # it may still read, as in `echo ... | nc`: like Go, finish its calls and try to reply

    def pause_writing(self) -> None:
        self._held_back = True
        self._active = self._loop.time()

    def resume_writing(self) -> None:
        self._held_back = False
        self._active = self._loop.time()
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (peers may go as they like)
        self._lost = True
        for call in self._calls:
            call.cancel()  # there is nobody to answer any more
        self._server.dismiss(self)

    # What the server asks for.

    def leave(self) -> None:
        """Close as soon as no call is in flight; those that come until then are refused."""
        self._advance()

    def end_calls(self) -> None:
        """Cancel the calls in flight, each with an error to its caller."""
        for call in self._calls:
            call.cancel()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def look(self, now: float) -> None:
        """Close if nothing has happened for too long."""
        quiet = now - self._active > self._limits.idle
        if quiet and (self._held_back or self._transport.is_closing()):  # it will never read what is to be written
            self._transport.abort()
        elif quiet and not self._calls:
            self._close()
        elif self._begun and self._reading and now - self._begun > self._limits.slow:
            self._give_up(f"expected a message to end within {self._limits.slow:g} s, found none that has")
            self._advance()

    # From request to reply.

    def _advance(self) -> None:
        """Begin the calls that have come, as many as may be in flight; read on, or not; close when all is done."""
        if self._lost or self._transport.is_closing():
            return
        came = False
        try:
            while not self._held_back and len(self._calls) < self._limits.calls:
                message = self._splitter.next()
                if message is None:
                    self._exhausted = True
                    break
                came = True
                self._begin(parse(message))
            else:
                self._exhausted = False
        except MalformedError as error:
            self._give_up(str(error))
        reading = self._exhausted and not self._ended and not self._held_back
        amid = self._splitter.amid and reading
        if came or not self._reading:
            self._active = self._loop.time()
            self._begun = self._active if amid else None
        elif amid and not self._begun:
            self._begun = self._loop.time()
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()
        if not self._calls and ((self._ended and self._exhausted) or self._server.going):
            self._close()

    def _close(self) -> None:
        self._active = self._loop.time()
        self._transport.close()

    def _give_up(self, problem: str) -> None:
        """Tell the peer that nothing more can be read of what it sends."""
        self._reply_error(b"null", f"rpc: server cannot decode request: {problem}")
        self._ended = self._exhausted = True
        self._splitter = Splitter(self._limits)

    def _begin(self, request: dict[str, Any]) -> None:
        """Begin a call, or refuse it."""
        given = request.get("id")
        request_id = b"%d" % given if type(given) is int else to_json(given, inf_nan_mode="null")
        name = request.get("method", "")
        method = self._server.methods.get(name) if isinstance(name, str) else None
        if method is None:
            self._reply_error(request_id, self._unknown(name))
        elif self._server.going:
            self._reply_error(request_id, f"rpc: {method.service} is going; {ELSEWHERE}")
        else:
            task = self._loop.create_task(self._call(method, request_id, request.get("params")))
            self._calls.add(task)
            task.add_done_callback(self._over)

    def _unknown(self, name: object) -> str:
        """Return Go's words for a method that cannot be called."""
        if not isinstance(name, str):
            return "rpc: server cannot decode request: expected a string as method, found something else"
        service, dot, _ = name.rpartition(".")
        if not dot:
            return f"rpc: service/method request ill-formed: {shortened(name)}"
        if service not in self._server.services:
            return f"rpc: can't find service {shortened(name)}"
        return f"rpc: can't find method {shortened(name)}"

    async def _call(self, method: _Method, request_id: bytes, params: Any) -> None:
        """Run a call and answer it."""
        path, meter = method.agreed.path, method.meter
        context = contexts.incoming(None, None)
        contexts.current.set(context)
        begun = meter.begin()
        code, error = "OK", ""
        try:
            argument = _argument(method.agreed, params)
            result = method.agreed.result.encode(await method.function(argument))
        except RefusedError as refusal:
            code, error = "ERROR", str(refusal)
            if error.endswith((ELSEWHERE, AGAIN)):  # somebody else's words, relayed: here they would say what is not so
                error += "."
        except (Exception, asyncio.CancelledError) as failure:
            if isinstance(failure, asyncio.CancelledError) and (self._server.going or self._lost):
                code, error = "CANCELLED", f"{path} could not be finished, the instance is going: {AGAIN}"
            else:  # the handler's own, be it that something which it has waited for was cancelled
                log.exception("%s failed", path, extra={"call": {"trace": context.trace_id}})
                code, error = "INTERNAL", f"{path} failed; the log has it under trace {context.trace_id}"
        else:
            reply = b'{"id":%b,"result":%b,"error":null}\n' % (request_id, result)
            if problem := too_much(reply, self._limits):
                code, error = "ERROR", f"{path} has a reply of {problem}"
            else:
                self._send(reply)
        if code != "OK":
            self._reply_error(request_id, error)
        meter.end(begun, code, context.trace_id)

    def _over(self, call: "asyncio.Task[None]") -> None:
        self._calls.discard(call)
        if not self._reading or self._server.going:
            self._advance()

    def _reply_error(self, request_id: bytes, text: str) -> None:
        sound = text.encode(errors="replace").decode()  # a handler's text may hold half of a surrogate pair
        if len(sound) > self._limits.message // 8:  # JSON may need six bytes for a character, and the id its own
            sound = shortened(sound)
        self._send(b'{"id":%b,"result":null,"error":%b}\n' % (request_id, to_json(sound)))

    def _send(self, reply: bytes) -> None:
        if self._lost:
            return
        self._transport.write(reply)
        if not self._held_back:
            self._active = self._loop.time()


def _argument(method: contracts.Method, params: Any) -> Any:
    """Return the one argument among a request's params; like Go, without a look at any after it."""
    if method.service == DISCOVERY.name:  # whose params OpenRPC leaves empty, which Go's client cannot
        return None
    if params is None:
        raise RefusedError("jsonrpc: request body missing params")
    if not isinstance(params, list) or not params:
        raise RefusedError(f"{method.path}: expected params as an array of one {method.parameter}")
    try:
        return method.parameter.decode(params[0])
    except BadValueError as error:
        raise RefusedError(f"{method.path}: {error}") from None
