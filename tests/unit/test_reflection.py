"""What instances say of themselves is learned, and whatever else they say is refused in time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, empty_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import (
    ErrorResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)

from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from contracts.student.v1 import student_pb2
from rollcall.reflection import MOST_BYTES, MOST_FILES, MOST_SERVICES, ReflectionError, reflect
from services.greeter.handler import Greeter

GREETER = "greeter.v1.GreeterService"
STUDENT = student_pb2.DESCRIPTOR.services_by_name["StudentService"].full_name


@asynccontextmanager
async def serving(*names: str, servicer: Any = None, v1: bool = False) -> AsyncIterator[str]:
    """Serve greeter, with reflection of these services, or such as the servicer has it; yield where."""
    server = grpc.aio.server()
    greeter_pb2_grpc.add_GreeterServiceServicer_to_server(Greeter(), server)
    if names:
        servicer = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])
    if v1:
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            ServerReflectionRequest.FromString,
            ServerReflectionResponse.SerializeToString,
        )
        methods = {"ServerReflectionInfo": handler}
        service = grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", methods)
        server.add_generic_rpc_handlers([service])
    elif servicer:
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class Says(reflection_pb2_grpc.ServerReflectionServicer):
    """Has these services, and for each question an answer, or ends."""

    def __init__(
        self, services: Iterable[str], answer: Callable[[str], list[FileDescriptorProto | bytes] | None]
    ) -> None:
        self.asked: list[str] = []
        self._services, self._answer = services, answer

    async def ServerReflectionInfo(
        self, questions: AsyncIterator[ServerReflectionRequest], _: Any
    ) -> AsyncIterator[ServerReflectionResponse]:
        async for question in questions:
            if question.list_services:
                services = [ServiceResponse(name=name) for name in self._services]
                yield ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))
                continue
            self.asked.append(question.file_containing_symbol or question.file_by_filename)
            files = self._answer(self.asked[-1])
            if files is None:
                return
            if not files:
                yield ServerReflectionResponse(
                    error_response=ErrorResponse(error_code=5, error_message="no such thing")
                )
                continue
            serialised = [each if isinstance(each, bytes) else each.SerializeToString() for each in files]
            found = FileDescriptorResponse(file_descriptor_proto=serialised)
            yield ServerReflectionResponse(file_descriptor_response=found)


def contract(name: str = "a/v1/a.proto", *imports: str, message: str = ".a.v1.A", package: str = "a.v1") -> Any:
    """Return a file with the service a.v1.AService, whose method takes and returns a message."""
    file = FileDescriptorProto(name=name, package=package, syntax="proto3", dependency=imports)
    file.message_type.add(name="A")
    file.service.add(name="AService").method.add(name="Do", input_type=message, output_type=message)
    return file


async def refused(servicer: Any, seconds: float = 5.0) -> str:
    async with serving(servicer=servicer) as target:
        with pytest.raises(ReflectionError) as caught:
            await reflect(target, timeout=seconds)
        return str(caught.value)


def test_services_are_described_with_all_their_methods_in_a_pool_of_their_own() -> None:
    async def run() -> None:
        async with serving(GREETER, STUDENT, "grpc.health.v1.Health") as target:
            found = await reflect(target)
            assert found == await reflect(target)
        assert found.services == (GREETER, STUDENT)
        kinds = {each.full_name: (each.client_streaming, each.server_streaming) for each in found.methods}
        assert kinds == {
            f"{GREETER}.Call": (False, False),
            f"{GREETER}.ClientStream": (True, False),
            f"{GREETER}.ServerStream": (False, True),
            f"{GREETER}.BidiStream": (True, True),
            f"{STUDENT}.AddFunc": (False, False),
            f"{STUDENT}.Get": (False, False),
            f"{STUDENT}.List": (False, False),
        }
        assert {"student.v1.Student", "student.v1.People", "greeter.v1.CallRequest"} <= {
            e.full_name for e in found.types
        }
        pools = {id(each.containing_service.file.pool) for each in found.methods}
        assert len(pools) == 1
        assert id(descriptor_pool.Default()) not in pools
        async with serving(GREETER) as target:
            assert await reflect(target) != found

    asyncio.run(run())


def test_what_was_described_can_be_called() -> None:
    async def run() -> None:
        async with serving(GREETER) as target:
            call = (await reflect(target)).methods[0]
            request, response = GetMessageClass(call.input_type), GetMessageClass(call.output_type)
            assert request is not greeter_pb2.CallRequest
            async with grpc.aio.insecure_channel(target) as channel:
                path = f"/{call.containing_service.full_name}/{call.name}"
                method = channel.unary_unary(
                    path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
                )
                answer: Any = await method(request(name="李白"))
        assert answer.msg == "Hello 李白"

    asyncio.run(run())


def test_a_server_that_knows_the_newer_reflection_alone_is_understood() -> None:
    async def run() -> None:
        servicer = reflection.aio.ReflectionServicer([GREETER])
        async with serving(servicer=servicer, v1=True) as target:
            assert (await reflect(target)).services == (GREETER,)

    asyncio.run(run())


def test_a_server_without_services_of_its_own_has_no_methods() -> None:
    async def run() -> None:
        async with serving("grpc.health.v1.Health") as target:
            found = await reflect(target)
        assert (found.services, found.methods, found.types, found.files) == ((), (), (), ())

    asyncio.run(run())


def test_imports_are_asked_for_unless_they_are_protobufs_own() -> None:
    shared = FileDescriptorProto(name="b/b.proto", package="b", syntax="proto3", dependency=["c/c.proto"])
    shared.message_type.add(name="B")
    deeper = FileDescriptorProto(name="c/c.proto", package="c", syntax="proto3")
    deeper.message_type.add(name="C").nested_type.add(name="Inner")
    file = contract("a/v1/a.proto", "b/b.proto", "google/protobuf/empty.proto", message=".b.B")
    file.source_code_info.location.add(leading_comments="not wanted")
    files: dict[str, Any] = {"a.v1.AService": file, "b/b.proto": shared, "c/c.proto": deeper}

    async def run() -> None:
        servicer = Says(["a.v1.AService"], lambda asked: [files[asked]])
        async with serving(servicer=servicer) as target:
            found = await reflect(target)
        assert servicer.asked == ["a.v1.AService", "b/b.proto", "c/c.proto"]
        assert [each.full_name for each in found.methods] == ["a.v1.AService.Do"]
        assert {each.full_name for each in found.types} == {
            "a.v1.A",
            "b.B",
            "c.C",
            "c.C.Inner",
            "google.protobuf.Empty",
        }
        assert not any(b"not wanted" in each for each in found.files)

    asyncio.run(run())


def test_protobufs_own_types_are_taken_from_nobody_else() -> None:
    forged = FileDescriptorProto(name="google/protobuf/empty.proto", package="google.protobuf", syntax="proto3")
    forged.message_type.add(name="Empty").field.add(
        name="field", number=1, type=FieldDescriptorProto.TYPE_INT32, label=FieldDescriptorProto.LABEL_OPTIONAL
    )
    file = contract("a/v1/a.proto", forged.name, message=".google.protobuf.Empty")

    async def run() -> None:
        async with serving(servicer=Says(["a.v1.AService"], lambda _: [file, forged])) as target:
            found = await reflect(target)
        assert found.methods[0].input_type.fields == []
        assert empty_pb2.DESCRIPTOR.serialized_pb in found.files
        forged.name = "a/v1/b.proto"
        said = await refused(Says(["a.v1.AService"], lambda _: [file, forged]))
        assert said == "expected google.protobuf to be protobuf's own, found a/v1/b.proto in it"

    asyncio.run(run())


def test_a_server_without_reflection_is_said_to_have_none() -> None:
    assert asyncio.run(refused(None)).startswith("expected gRPC reflection, found none")


def test_nobody_there_is_said() -> None:
    async def run() -> str:
        async with serving(GREETER) as target:
            pass
        with pytest.raises(ReflectionError) as caught:
            await reflect(target)
        return str(caught.value)

    assert asyncio.run(run()).startswith("expected an answer by gRPC reflection, found UNAVAILABLE")


class Hangs(reflection_pb2_grpc.ServerReflectionServicer):
    async def ServerReflectionInfo(self, _: Any, __: Any) -> AsyncIterator[ServerReflectionResponse]:
        await asyncio.Event().wait()
        yield ServerReflectionResponse()


class Fails(reflection_pb2_grpc.ServerReflectionServicer):
    async def ServerReflectionInfo(self, _: Any, context: Any) -> AsyncIterator[ServerReflectionResponse]:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "x" * 1000)
        yield ServerReflectionResponse()


def test_a_server_that_hangs_is_left_in_time() -> None:
    async def run() -> None:
        started = asyncio.get_running_loop().time()
        said = await refused(Hangs(), 0.3)
        assert said == "expected it to describe itself within 0.3 s, by gRPC reflection"
        assert asyncio.get_running_loop().time() - started < 2

    asyncio.run(run())


def test_a_server_that_refuses_is_quoted_in_brief() -> None:
    said = asyncio.run(refused(Fails()))
    assert said == f"expected an answer by gRPC reflection, found PERMISSION_DENIED: {'x' * 200}"


def endless(asked: str) -> list[Any]:
    """Each file imports the next."""
    if asked == "a.v1.AService":
        return [contract("a/v1/a.proto", "0")]
    return [FileDescriptorProto(name=asked, dependency=[str(int(asked) + 1)])]


MANY = [FileDescriptorProto(name=f"{number}.proto") for number in range(MOST_FILES)]
LARGE = contract()
LARGE.message_type.add(name="x" * MOST_BYTES)
ONE = ["a.v1.AService"]


@pytest.mark.parametrize(
    ("services", "answer", "expected"),
    [
        ([f"a.v{number}.A" for number in range(MOST_SERVICES + 1)], lambda _: [], "expected at most 100 services"),
        (ONE, lambda _: [contract(), *MANY], "expected at most 500 files"),
        (ONE, endless, "expected at most 500 files"),
        (ONE, lambda _: [LARGE], "expected at most 500 files and 4194304 bytes of them"),
        (ONE, lambda _: [b"\xff\xff"], "expected a FileDescriptorProto, found other bytes"),
        (ONE, lambda _: [], "found no such thing"),
        (ONE, lambda _: None, "found that it has ended the conversation"),
        (ONE, lambda _: [contract(package="b.v1", message=".b.v1.A")], "expected the descriptors of a contract"),
        (ONE, lambda _: [contract(message=".a.v1.No")], "expected the descriptors of a contract"),
        (ONE, lambda _: [contract("a", "b"), contract("b", "a")], "expected files that import each other in no circle"),
        (ONE, lambda _: [contract("a", "b")], "expected the file b, which others import, found another"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_no_contract_or_more_than_one_can_be_is_refused(
    services: list[str], answer: Callable[[str], Any], expected: str
) -> None:
    said = asyncio.run(refused(Says(services, answer)))
    assert expected in said
    assert len(said) < 500
