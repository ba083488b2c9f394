"""`call`: any method of any service, by what the service says of itself."""

import asyncio
import base64
import binascii
import math
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import click
import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from pydantic_core import from_json

from rollcall import jsonrpc
from rollcall.channel import dial
from rollcall.cli import show
from rollcall.instrument import INSTANCE
from rollcall.reflection import Described, ReflectionError, reflect
from rollcall.registry import Instance, Registry, RegistryError
from rollcall.settings import BadSettingError, CallSettings, load

ASK = 2.0  # seconds that an instance has to describe itself
ASKED = 3  # most instances that are asked, one after the other
DAY = 86_400.0  # seconds; no call can have more
CHUNK = 65_536  # most bytes that are read from standard input at a time
STDIN = "-"


def _complete_method(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Return the services that begin like this and, behind a service's point, its methods."""
    try:
        registry = show.registry(context)
        names = registry.services()
        if found := [f"{name}." for name in names if name.startswith(begun)]:
            return found
        name, method = _parted(names, begun)
        described = asyncio.run(_described(registry.instances(name), name))
    except (RegistryError, BadSettingError, show.FoundError, click.UsageError):
        return []
    return [f"{name}.{each}" for each in _by_name(described) if each.startswith(method)]


def _seconds(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 < value <= DAY):
        raise click.BadParameter(f"expected seconds, more than 0 and at most {DAY:.0f}")
    return value


@click.command()
@click.argument("method", metavar="SERVICE.METHOD", shell_complete=_complete_method)
@click.argument("messages", metavar="[JSON]...", nargs=-1)
@click.option(
    "--deadline", type=float, callback=_seconds, help="Seconds for the call.  [5; where something streams: a day]"
)
@click.option("--tag", default="", help="Call instances that have this tag.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Metadata for a gRPC call; may be given again.")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error who has answered, and how fast.")
@show.pass_registry
def call(
    registry: Registry,
    method: str,
    messages: tuple[str, ...],
    deadline: float | None,
    tag: str,
    metadata: tuple[str, ...],
    *,
    verbose: bool,
) -> None:
    """Call a method: messages and answers are JSON.

    \b
        rollcall call sum.Add '{"num1": 333, "num2": 666}'
        rollcall call greeter.ClientStream '{"stroke": 1}' '{"stroke": 2}'
        seq 3 | sed 's/.*/{"stroke": &}/' | rollcall call greeter.BidiStream -

    The instance is found as by any caller. Without a message a method that takes one gets an empty one; with - standard
    input is sent: for a stream each line. No proto is needed: services describe themselves, by gRPC reflection or
    JSON-RPC's rpc.discover. The value of metadata whose key ends in -bin is given in base64.
    """  # noqa: D301 (what click takes for "leave these lines as they are")
    name, wanted = _parted(registry.services(), method)
    pairs = [_pair(each) for each in metadata]
    asyncio.run(_Call(registry, name, tag, deadline, pairs, verbose=verbose).make(wanted, messages))


def _parted(names: Sequence[str], method: str) -> tuple[str, str]:
    """Part SERVICE.METHOD behind the longest name that is a service's. Raises `FoundError` when there is none."""
    fits = [name for name in names if method.startswith(f"{name}.")]
    if not fits:
        name, _, rest = method.partition(".")
        if not rest:
            raise click.BadParameter(f"expected SERVICE.METHOD, such as sum.Add, found {method!r}")
        raise show.unknown("service", name, names)
    name = max(fits, key=len)
    return name, method.removeprefix(f"{name}.")


def _pair(text: str) -> tuple[str, str | bytes]:
    key, _, value = text.partition("=")
    if not (re.fullmatch(r"[0-9a-z_.-]+", key) and value.isascii() and value.isprintable()):
        raise click.BadParameter(
            f"expected metadata as key=VALUE, the key of lower-case letters, digits, - _ and ., the value printable "
            f"ASCII; found {text!r}"
        )
    if not key.endswith("-bin"):
        return key, value
    try:
        return key, base64.b64decode(value, validate=True)
    except binascii.Error:
        raise click.BadParameter(f"expected the value of {key} in base64, found {value!r}") from None


async def _described(instances: Sequence[Instance], whose: str) -> Described | list[jsonrpc.Described]:
    """Have one of a service's instances describe it. Raises `FoundError` when none does."""
    problem = f"no instance of {whose} passes its checks"
    for instance in instances[:ASKED]:
        protocol = instance.meta.get("protocol", "grpc")
        if protocol == "http":
            raise show.FoundError(
                f"{instance.name} speaks HTTP: call it at http://{instance.target}/, with curl for one"
            )
        try:
            if protocol == "jsonrpc":
                return await jsonrpc.discover(instance.target, deadline=ASK)
            return await reflect(instance.target, timeout=ASK)
        except (ReflectionError, jsonrpc.JsonRpcError) as error:
            problem = f"{instance.id} at {instance.target} does not tell its methods: {error}"
    raise show.FoundError(problem)


def _by_name(described: Described | list[jsonrpc.Described]) -> dict[str, Any]:
    """Return the methods of a service by their own names, or by their full ones where two share a name."""
    methods: Sequence[Any] = described.methods if isinstance(described, Described) else described
    names = [each.name for each in methods]
    return {each.name if names.count(each.name) == 1 else _full_name(each): each for each in methods}


def _full_name(method: Any) -> str:
    return str(method.full_name) if isinstance(method, MethodDescriptor) else f"{method.service}.{method.name}"


class _Call:
    """A call to be made, whatever its service speaks."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        tag: str,
        deadline: float | None,
        metadata: Sequence[tuple[str, str | bytes]],
        *,
        verbose: bool,
    ) -> None:
        self._registry, self._name, self._tag = registry, name, tag
        self._deadline, self._metadata, self._verbose = deadline, metadata, verbose
        self._begun = 0.0

    async def make(self, wanted: str, messages: tuple[str, ...]) -> None:
        """Make it, and print what is answered. Raises `FoundError` with the code of its status when it fails."""
        instances = await asyncio.to_thread(self._registry.instances, self._name, self._tag)
        described = await _described(instances, self._name + (f" with tag {self._tag!r}" if self._tag else ""))
        methods = _by_name(described)
        found = methods.get(wanted) or next((each for each in methods.values() if _full_name(each) == wanted), None)
        if found is None:
            raise show.unknown(f"method of {self._name}", wanted, methods)
        if isinstance(described, Described):
            instance = await self._grpc(found, messages)
        else:
            instance = await self._jsonrpc(described, found, messages)
        if self._verbose:
            took = 1000 * (time.monotonic() - self._begun)
            click.echo(f"answered by {instance or 'one that does not say who it is'} in {took:.1f} ms", err=True)

    async def _grpc(self, method: MethodDescriptor, messages: tuple[str, ...]) -> str:
        asks, answers = method.client_streaming, method.server_streaming
        request = () if asks else (_message(method, await _one(method.name, messages) or "{}"),)
        typed = [_message(method, text) for text in messages if asks and messages != (STDIN,)]
        path = f"/{method.containing_service.full_name}/{method.name}"
        seconds = DAY if self._deadline is None and (asks or answers) else self._deadline
        async with dial(self._name, tag=self._tag, registry=self._registry) as channel:
            if method.GetOptions().idempotency_level:
                channel.idempotent(path)
            made = getattr(channel, f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}")(
                path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            self._begun = time.monotonic()
            opened = made(*request, metadata=self._metadata, timeout=seconds)
            writing = asyncio.create_task(_write(opened, method, typed, messages)) if asks else None
            try:
                await _read(opened, method)
                return next(
                    (str(value) for key, value in await opened.trailing_metadata() or () if key == INSTANCE), ""
                )
            except grpc.aio.AioRpcError as error:
                number = error.code().value[0]
                raise show.FoundError(f"{error.code().name}: {error.details()}", show.CALL + number) from None
            except asyncio.CancelledError:
                if writing and writing.done() and not writing.cancelled() and (problem := writing.exception()):
                    raise problem from None
                raise
            finally:
                if writing:
                    writing.cancel()

    async def _jsonrpc(self, described: list[jsonrpc.Described], method: jsonrpc.Described, messages: Any) -> str:
        if self._metadata:
            raise click.BadParameter(f"expected no --metadata: {self._name} speaks JSON-RPC, which has none")
        text = await _one(method.name, messages) or "null"
        try:
            argument = from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise click.BadParameter(f"expected JSON, found {text!r}: {error}") from None
        contract = jsonrpc.Contract.described(self._name, described)
        seconds = self._deadline or load(CallSettings).deadline
        codes = grpc.StatusCode
        try:
            async with jsonrpc.dial(
                contract, name=self._name, tag=self._tag, registry=self._registry, deadline=seconds
            ) as client:
                self._begun = time.monotonic()
                show.document(await getattr(client, _full_name(method))(argument))
        except jsonrpc.JsonRpcError as error:
            code = {
                jsonrpc.DeadlineExceededError: codes.DEADLINE_EXCEEDED,
                jsonrpc.UnavailableError: codes.UNAVAILABLE,
            }.get(type(error), codes.UNKNOWN)
            raise show.FoundError(f"{code.name}: {error}", show.CALL + code.value[0]) from None
        return jsonrpc.answered_by.get()


async def _write(opened: Any, method: MethodDescriptor, typed: list[Message], messages: tuple[str, ...]) -> None:
    """Send the messages that were typed, or each line of standard input as it comes; one that is none ends the call."""
    try:
        for message in typed:
            await opened.write(message)
        if messages == (STDIN,):
            async for line in _lines():
                if line.strip():
                    await opened.write(_message(method, line))
        await opened.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # it has ended before: `_read` raises what with
    except click.UsageError:
        opened.cancel()
        raise


async def _read(opened: Any, method: MethodDescriptor) -> None:
    """Print what is answered. Raises `grpc.aio.AioRpcError`."""
    if method.server_streaming:
        async for answer in opened:
            _print(answer, method)
    else:
        _print(await opened, method)


async def _one(name: str, messages: tuple[str, ...]) -> str:
    """Return the one message that a method takes, or all of standard input; empty when there is none."""
    if len(messages) > 1:
        raise click.BadParameter(
            f"expected one message for {name}, which takes no stream of them, found {len(messages)}"
        )
    return "".join([line async for line in _lines()]) if messages == (STDIN,) else "".join(messages)


async def _lines() -> AsyncIterator[str]:
    """Yield the lines of standard input as they come.

    They are read on a thread that nobody waits for: a terminal on which nothing is typed must not keep a call open that
    is over. And past `sys.stdin`, which could not be closed at the end while that thread is in it.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

    def read() -> None:
        chunk = b"-"
        while chunk:
            chunk = os.read(0, CHUNK)
            try:
                asyncio.run_coroutine_threadsafe(queue.put(chunk), loop).result()
            except RuntimeError:  # the loop has been closed
                return

    threading.Thread(target=read, name="standard input", daemon=True).start()
    rest = b""
    while chunk := await queue.get():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield _text(line) + "\n"
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"expected UTF-8 on standard input: {error}") from None


def _message(method: MethodDescriptor, text: str) -> Message:
    kind = method.input_type
    try:
        return json_format.Parse(text, GetMessageClass(kind)(), descriptor_pool=kind.file.pool)
    except (json_format.ParseError, TypeError) as error:  # the latter where an Any holds what nobody has described
        raise click.BadParameter(f"expected a {kind.name} as JSON, found {text.strip()!r}: {error}") from None


def _print(answer: Message, method: MethodDescriptor) -> None:
    pool = method.output_type.file.pool
    try:
        shown = json_format.MessageToDict(answer, always_print_fields_with_no_presence=True, descriptor_pool=pool)
    except (json_format.SerializeToJsonError, TypeError) as error:
        raise show.FoundError(f"the answer cannot be said in JSON: {error}") from None
    show.document(shown)
