"""Asking an instance what can be called on it: gRPC server reflection.

https://grpc.io/docs/guides/reflection/
"""

import asyncio
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

MOST_SERVICES = 100
MOST_FILES = 500
MOST_BYTES = 4 * 1024 * 1024  # of all files together; as serialised, without comments
MOST_TEXT = 200  # characters of what the other side says, in an error

_STANDARD = ("grpc.health.v1.Health", "grpc.channelz.v1.Channelz")
_REFLECTION = "grpc.reflection."

# v1 and v1alpha differ in nothing but the name. Python's servers know the older one alone, some others the newer.
_VERSIONS = ("v1alpha", "v1")

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # the connection goes with the channel
    ("grpc.max_receive_message_length", 2 * MOST_BYTES),
)

_GOOGLE = "google.protobuf"
_OURS = {
    file.name: file.serialized_pb
    for file in (
        importlib.import_module(f"{_GOOGLE}.{name}_pb2").DESCRIPTOR
        for name in (
            "any",
            "api",
            "descriptor",
            "duration",
            "empty",
            "field_mask",
            "source_context",
            "struct",
            "timestamp",
            "type",
            "wrappers",
        )
    )
}
"""The files of protobuf's own types. Their JSON is code of ours, so they are taken from nobody else."""


class ReflectionError(Exception):
    """An instance has not told what can be called on it. The text says what it was asked, and what it did instead."""


@dataclass(frozen=True)
class Described:
    """What an instance has said of itself. Two are equal when they say the same: the same services, the same files."""

    services: tuple[str, ...]
    """Full names, sorted, without those that every instance serves beside its own: health, channelz, reflection."""
    files: tuple[bytes, ...]
    """The serialised FileDescriptorProtos, each after those that it imports."""
    methods: tuple[MethodDescriptor, ...] = field(compare=False)
    """The methods of all services, in the order of their files. Their descriptors are of a pool of their own."""
    types: tuple[Descriptor, ...] = field(compare=False)
    """All messages of the files: what a google.protobuf.Any can hold."""


async def reflect(target: str, *, timeout: float = 5.0) -> Described:  # noqa: ASYNC109 (units and bound are documented)
    """Ask the instance at HOST:PORT what can be called on it; the whole has `timeout` seconds.

    Raises `ReflectionError` when it does not tell: nobody is there, it has no reflection, it does not answer in time,
    what it says is no protobuf, or more than a contract can be.
    """
    try:
        async with asyncio.timeout(timeout):
            for version in _VERSIONS:
                try:
                    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
                        ask = _Ask(channel, version)
                        services = await _services(ask)
                        files = await _files(ask, services)
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNIMPLEMENTED or version == _VERSIONS[-1]:
                        raise
    except TimeoutError:
        raise ReflectionError(f"expected it to describe itself within {timeout:g} s, by gRPC reflection") from None
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise ReflectionError(
                "expected gRPC reflection, found none; turn it on, as `rollcall.Service` does"
            ) from None
        detail = (error.details() or "")[:MOST_TEXT]
        raise ReflectionError(f"expected an answer by gRPC reflection, found {error.code().name}: {detail}") from None
    return _build(services, files)


class _Ask:
    """Asks questions, each by a call of its own.

    All could be asked in one, but to write into a call that the server has ended may hide what it has ended it with.
    """

    def __init__(self, channel: grpc.aio.Channel, version: str) -> None:
        self._method: Any = channel.unary_stream(
            f"/{_REFLECTION}{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )

    async def __call__(self, wanted: str, **question: Any) -> ServerReflectionResponse:
        """Ask a question. Raises `ReflectionError` if the answer is none to it."""
        asked = " ".join(map(str, *question.items()))[:MOST_TEXT]
        call = self._method(ServerReflectionRequest(**question))
        try:
            answer = await call.read()
        finally:
            call.cancel()
        if answer is grpc.aio.EOF:
            raise ReflectionError(f"expected an answer to {asked}, found that it has ended the conversation")
        found: ServerReflectionResponse = answer
        if found.WhichOneof("message_response") != wanted:
            said = found.error_response.error_message[:MOST_TEXT] or found.WhichOneof("message_response")
            raise ReflectionError(f"expected {wanted} to {asked}, found {said}")
        return found


async def _services(ask: _Ask) -> tuple[str, ...]:
    answer = await ask("list_services_response", list_services="*")
    names = {each.name for each in answer.list_services_response.service}
    names = {each for each in names if each not in _STANDARD and not each.startswith(_REFLECTION)}
    if len(names) > MOST_SERVICES:
        raise ReflectionError(f"expected at most {MOST_SERVICES} services, found {len(names)}")
    return tuple(sorted(names))


async def _files(ask: _Ask, services: Iterable[str]) -> dict[str, FileDescriptorProto]:
    """Return the files that describe the services, and all that those import, each after what it imports."""
    files = _Files()
    for service in services:
        files.take(await ask("file_descriptor_response", file_containing_symbol=service))
    while missing := files.missing():
        for name in missing:
            if name not in _OURS:
                files.take(await ask("file_descriptor_response", file_by_filename=name))
            elif name not in files.found:
                files.add(FileDescriptorProto(name=name))
            if name not in files.found:
                raise ReflectionError(f"expected the file {name[:MOST_TEXT]}, which others import, found another")
    return {name: files.found[name] for name in _in_order(files.found)}


class _Files:
    """Files by name, as many as a contract can have."""

    def __init__(self) -> None:
        self.found: dict[str, FileDescriptorProto] = {}
        self._size = 0

    def take(self, answer: ServerReflectionResponse) -> None:
        """Add the files of an answer. Raises `ReflectionError` for what is none, and for too much."""
        for serialised in answer.file_descriptor_response.file_descriptor_proto:
            try:
                file = FileDescriptorProto.FromString(serialised)
            except DecodeError as error:
                raise ReflectionError(f"expected a FileDescriptorProto, found other bytes: {error}") from None
            if file.name not in self.found:  # some tell what is imported again each time
                self._size += len(serialised)
                self.add(file)
        if len(self.found) > MOST_FILES or self._size > MOST_BYTES:
            raise ReflectionError(f"expected at most {MOST_FILES} files and {MOST_BYTES} bytes of them, found more")

    def add(self, file: FileDescriptorProto) -> None:
        """Add a file unless one of its name is there."""
        if file.name in _OURS:
            file = FileDescriptorProto.FromString(_OURS[file.name])
        elif file.package == _GOOGLE:
            raise ReflectionError(f"expected {_GOOGLE} to be protobuf's own, found {file.name[:MOST_TEXT]} in it")
        file.ClearField("source_code_info")
        self.found.setdefault(file.name, file)

    def missing(self) -> list[str]:
        """Return the names of files that others import and that are not there."""
        return sorted({name for file in self.found.values() for name in file.dependency} - self.found.keys())


def _in_order(files: dict[str, FileDescriptorProto]) -> Iterator[str]:
    """Yield the names of files, each after those that it imports. Raises `ReflectionError` if they go in circles."""
    waiting = {name: set(files[name].dependency) for name in sorted(files)}
    while waiting:
        ready = [name for name, imports in waiting.items() if not imports & waiting.keys()]
        if not ready:
            raise ReflectionError(f"expected files that import each other in no circle, found {sorted(waiting)[:3]}")
        for name in ready:
            del waiting[name]
            yield name


def _build(services: tuple[str, ...], files: dict[str, FileDescriptorProto]) -> Described:
    pool = DescriptorPool()
    serialised = tuple(file.SerializeToString(deterministic=True) for file in files.values())
    try:
        for each in serialised:
            pool.AddSerializedFile(each)
        methods = tuple(method for name in services for method in pool.FindServiceByName(name).methods)
    except (TypeError, KeyError, ValueError) as error:
        raise ReflectionError(f"expected the descriptors of a contract, found: {str(error)[:MOST_TEXT]}") from None
    types = tuple(
        message
        for name in files
        for outer in pool.FindFileByName(name).message_types_by_name.values()
        for message in _with_nested(outer)
    )
    return Described(services, serialised, methods, types)


def _with_nested(message: Descriptor) -> Iterator[Descriptor]:
    if not message.GetOptions().map_entry:
        yield message
        for nested in message.nested_types:
            yield from _with_nested(nested)
