"""The methods that can be called, whatever they are called by: JSON in, JSON out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from jsonschema_rs import Draft202012Validator
from pydantic_core import from_json, to_json

from rollcall import jsonrpc
from rollcall.instrument import INSTANCE
from services.gateway.openapi import Operation
from services.gateway.problem import ProblemError, of_call, of_outcome, of_status
from services.gateway.schema import Schemas, UnfitError, to_message, to_value, violations

DAY = 86_400.0  # seconds
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method has answered, as JSON, and the id of the instance that has; empty when it did not say."""

    body: bytes
    instance: str


class Stream(Protocol):
    """An open call that streams. Each of its methods raises `ProblemError` when the call fails."""

    async def write(self, message: Any) -> None:
        """Send one of the client's messages; waits while the service does not read."""

    async def done(self) -> None:
        """Say that the client has no more."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the service's messages, as JSON."""

    async def instance(self) -> str:
        """Return the id of the instance that has answered, once it has; empty when it did not say."""

    def cancel(self) -> None:
        """End the call, if it has not ended. Harmless when it has."""


class Method(Protocol):
    """A method of a service."""

    operation: Operation
    full_name: str
    """Its name with its contract's, by which it can be called too."""

    def parse(self, body: bytes | str) -> Any:
        """Return the message that JSON stands for. Raises `ProblemError` when it stands for none."""

    async def call(self, message: Any, metadata: Metadata, seconds: float) -> Answer:
        """Make a call with one message and one answer. Raises `ProblemError`."""

    def open(self, message: Any, metadata: Metadata, seconds: float | None) -> Stream:
        """Begin a call that streams; `message` is None where the client streams."""


def _parse(body: bytes | str, validator: Draft202012Validator) -> Any:
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ProblemError(400, f"expected JSON, found none: {error}", "INVALID_ARGUMENT") from None
    if not validator.is_valid(value):
        found = violations(validator, value)
        text = "; ".join(f"{field}: {each}" if field else each for field, each in found.items())
        raise ProblemError(400, text, "INVALID_ARGUMENT", violations=found)
    return value


class GrpcMethod:
    """A gRPC method, as its service has described it by reflection."""

    def __init__(self, service: str, name: str, descriptor: MethodDescriptor, schemas: Schemas, channel: Any) -> None:
        self.full_name = descriptor.full_name
        contract = descriptor.containing_service.full_name
        asks, answers = descriptor.client_streaming, descriptor.server_streaming
        kind = {(0, 0): "unary", (0, 1): "server_stream", (1, 0): "client_stream", (1, 1): "bidi_stream"}[asks, answers]
        level = descriptor.GetOptions().idempotency_level
        self.operation = Operation(
            service=service,
            method=name,
            contract=contract,
            kind=kind,
            idempotent=level > 0,
            protocol="grpc",
            request=schemas.accepted(descriptor.input_type),
            response=schemas.answered(descriptor.output_type),
        )
        self._request = GetMessageClass(descriptor.input_type)
        self._validator = schemas.validator(descriptor.input_type)
        path = f"/{contract}/{descriptor.name}"
        if level:
            channel.idempotent(path)
        make = getattr(channel, f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}")
        response = GetMessageClass(descriptor.output_type)
        self._call = make(path, request_serializer=_serialized, response_deserializer=response.FromString)

    def parse(self, body: bytes | str) -> Message:
        """See `Method.parse`."""
        value = _parse(body, self._validator)
        try:
            return to_message(value, self._request())
        except UnfitError as error:
            raise ProblemError(400, str(error), "INVALID_ARGUMENT") from None

    async def call(self, message: Message, metadata: Metadata, seconds: float) -> Answer:
        """See `Method.call`."""
        call = self._call(message, metadata=metadata, timeout=seconds)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            raise of_call(error, _instance(error.trailing_metadata())) from None
        return Answer(_json(answer), _instance(await call.trailing_metadata()))

    def open(self, message: Message | None, metadata: Metadata, seconds: float | None) -> "GrpcStream":
        """See `Method.open`."""
        request = () if message is None else (message,)
        if seconds is None and self.operation.kind == "client_stream":
            seconds = DAY  # else it would have no more time than a call with one message: its answer is one
        return GrpcStream(self._call(*request, metadata=metadata, timeout=seconds), self.operation.kind)


class GrpcStream:
    """An open gRPC call that streams."""

    def __init__(self, call: Any, kind: str) -> None:
        self._call, self._kind = call, kind

    async def write(self, message: Message) -> None:
        """See `Stream.write`."""
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._failed()

    async def done(self) -> None:
        """See `Stream.done`."""
        try:
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._failed()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See `Stream.__aiter__`."""
        try:
            if self._kind == "client_stream":
                yield _json(await self._call)
                return
            async for answer in self._call:
                yield _json(answer)
        except grpc.aio.AioRpcError as error:
            raise of_call(error, _instance(error.trailing_metadata())) from None

    async def instance(self) -> str:
        """See `Stream.instance`."""
        return _instance(await self._call.trailing_metadata())

    def cancel(self) -> None:
        """See `Stream.cancel`."""
        self._call.cancel()

    async def _failed(self) -> None:
        """Raise what the call has ended with, before its client had said that it was done."""
        code, instance = await self._call.code(), await self.instance()
        if code != grpc.StatusCode.OK:
            raise of_outcome(code, await self._call.details() or "", instance)


class JsonRpcMethod:
    """A JSON-RPC method, as its service has described it."""

    def __init__(self, service: str, name: str, described: jsonrpc.Described, client: Any) -> None:
        self.full_name = f"{described.service}.{described.name}"
        self.operation = Operation(
            service=service,
            method=name,
            contract=described.service,
            kind="unary",
            idempotent=described.idempotent,
            protocol="jsonrpc",
            request=described.parameter,
            response=described.result,
            doc=described.doc,
        )
        try:
            self._validator = Draft202012Validator(described.parameter, retriever=_retrieve_nothing)
        except ValueError as error:
            raise jsonrpc.JsonRpcError(f"{self.full_name} takes what no schema describes: {error}") from None
        self._call = getattr(client, self.full_name)

    def parse(self, body: bytes | str) -> Any:
        """See `Method.parse`."""
        return _parse(body, self._validator)

    async def call(self, message: Any, metadata: Metadata, seconds: float) -> Answer:  # noqa: ARG002 (none on the wire)
        """See `Method.call`."""
        jsonrpc.answered_by.set("")
        try:
            async with asyncio.timeout(seconds):
                result = await self._call(message)
        except TimeoutError:
            raise of_status(grpc.StatusCode.DEADLINE_EXCEEDED, f"not answered in {seconds:.3g} s") from None
        except jsonrpc.DeadlineExceededError as error:
            raise of_status(grpc.StatusCode.DEADLINE_EXCEEDED, str(error)) from None
        except jsonrpc.UnavailableError as error:
            raise of_outcome(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        except jsonrpc.RemoteError as error:
            raise of_status(grpc.StatusCode.UNKNOWN, str(error), jsonrpc.answered_by.get()) from None
        except jsonrpc.JsonRpcError as error:
            raise ProblemError(413, str(error)) from None
        return Answer(to_json(result), jsonrpc.answered_by.get())

    def open(self, message: Any, metadata: Metadata, seconds: float | None) -> Stream:
        """Say that nothing streams in JSON-RPC."""
        raise NotImplementedError


def _retrieve_nothing(uri: str) -> Any:
    """Refuse to fetch what a schema refers to: it is a service that has sent it."""
    raise ValueError(f"expected a schema that is complete in itself, found a reference to {uri[:100]}")


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _json(message: Message) -> bytes:
    try:
        return to_json(to_value(message))
    except UnfitError as error:
        raise ProblemError(500, f"the service's answer cannot be said in JSON: {error}", "INTERNAL") from None


def _instance(metadata: Any) -> str:
    for key, value in metadata or ():
        if key == INSTANCE:
            return str(value)
    return ""
