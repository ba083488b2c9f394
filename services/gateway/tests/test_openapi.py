"""The document is OpenAPI 3.1, all that it refers to is there, and what it says can be sent is understood."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import grpc.aio
import jsonschema_rs
import pytest
import schemathesis
from fastapi.openapi.models import OpenAPI
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection
from hypothesis import HealthCheck, given, settings

from contracts.greeter.v1 import greeter_pb2
from contracts.student.v1 import student_pb2
from rollcall.reflection import Described, reflect
from services.gateway.openapi import Operation, document, merge
from services.gateway.problem import STATUSES, ProblemError, of_status
from services.gateway.schema import COMPONENTS, Schemas, to_message

KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
JSON_RPC = Operation(
    service="hello",
    method="HelloWorld",
    contract="hello",
    kind="unary",
    idempotent=True,
    protocol="jsonrpc",
    request={"$ref": "#/$defs/Name", "$defs": {"Name": {"type": "string"}}},
    response={"type": "array", "items": {"$ref": "#/$defs/Text"}, "$defs": {"Text": {"type": "string"}}},
    doc="HelloWorld greets.",
)


def described(*files: Any) -> Described:
    """Return what a server with the services of these files says of itself."""

    async def ask() -> Described:
        server = grpc.aio.server()
        names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection(names, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return await reflect(f"127.0.0.1:{port}")
        finally:
            await server.stop(None)

    return asyncio.run(ask())


def operations(said: Described) -> tuple[list[Operation], Schemas]:
    schemas = Schemas(said.types)
    found = [
        Operation(
            service=each.containing_service.full_name.partition(".")[0],
            method=each.name,
            contract=each.containing_service.full_name,
            kind=KINDS[each.client_streaming, each.server_streaming],
            idempotent=each.GetOptions().idempotency_level > 0,
            protocol="grpc",
            request=schemas.accepted(each.input_type),
            response=schemas.answered(each.output_type),
        )
        for each in said.methods
    ]
    return found, schemas


SAID = described(student_pb2, greeter_pb2)
OPERATIONS, SCHEMAS = operations(SAID)
DOCUMENT = document("Rollcall", "1", [*OPERATIONS, JSON_RPC], SCHEMAS.components)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def found_at(reference: str, root: Any) -> Any:
    assert reference.startswith("#/")
    for key in reference[2:].split("/"):
        root = root[key.replace("~1", "/").replace("~0", "~")]
    return root


def test_it_is_openapi() -> None:
    OpenAPI.model_validate(json.loads(json.dumps(DOCUMENT)))
    loaded = schemathesis.openapi.from_dict(DOCUMENT)
    assert sum(1 for _ in loaded.get_all_operations()) == 8
    loaded.validate()
    for each in references(DOCUMENT):
        found_at(each, DOCUMENT)
    for schema in DOCUMENT["components"]["schemas"].values():
        assert jsonschema_rs.meta.is_valid({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    ids = [each["operationId"] for item in DOCUMENT["paths"].values() for each in item.values()]
    assert len(ids) == len(set(ids)) == 8


def test_each_method_has_its_place() -> None:
    assert {path: [*item] for path, item in DOCUMENT["paths"].items()} == {
        "/v1/greeter/BidiStream": ["get"],
        "/v1/greeter/Call": ["post"],
        "/v1/greeter/ClientStream": ["get"],
        "/v1/greeter/ServerStream": ["post"],
        "/v1/hello/HelloWorld": ["post"],
        "/v1/student/AddFunc": ["post"],
        "/v1/student/Get": ["post"],
        "/v1/student/List": ["post"],
    }
    add = DOCUMENT["paths"]["/v1/student/AddFunc"]["post"]
    assert (add["operationId"], add["tags"]) == ("student.AddFunc", ["student"])
    assert add["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": f"{COMPONENTS}student.v1.Student-Input"
    }
    answer = add["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": f"{COMPONENTS}student.v1.Student"}
    assert add["x-rollcall"] == {
        "service": "student",
        "method": "AddFunc",
        "contract": "student.v1.StudentService",
        "kind": "unary",
        "idempotent": False,
        "protocol": "grpc",
    }
    events = DOCUMENT["paths"]["/v1/greeter/ServerStream"]["post"]
    assert [*events["responses"]["200"]["content"]] == ["text/event-stream"]
    assert events["x-rollcall"]["response"] == {"$ref": f"{COMPONENTS}greeter.v1.ServerStreamResponse"}
    socket = DOCUMENT["paths"]["/v1/greeter/BidiStream"]["get"]
    assert socket["x-rollcall"]["idempotent"]
    assert socket["x-rollcall"]["request"] == {"$ref": f"{COMPONENTS}greeter.v1.BidiStreamRequest-Input"}
    assert {"101", "426"} <= socket["responses"].keys()
    assert not {"200", "415"} & socket["responses"].keys()
    assert [tag["name"] for tag in DOCUMENT["tags"]] == ["greeter", "hello", "student"]


def test_definitions_of_a_schemas_own_become_components() -> None:
    hello = DOCUMENT["paths"]["/v1/hello/HelloWorld"]["post"]
    schema = hello["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": f"{COMPONENTS}hello.HelloWorld-Input.Name"}
    assert found_at(schema["$ref"], DOCUMENT) == {"type": "string"}
    assert hello["description"].startswith("HelloWorld greets.")


def test_every_problem_of_a_service_is_among_the_answers_and_fits_its_schema() -> None:
    problem = jsonschema_rs.Draft202012Validator(DOCUMENT["components"]["schemas"]["Problem"])
    for operation in (each for item in DOCUMENT["paths"].values() for each in item.values()):
        for status in STATUSES.values():
            assert str(status) in operation["responses"]
    for code in STATUSES:
        assert problem.is_valid(of_status(code, "why").document())
    assert problem.is_valid(ProblemError(400, "why", "INVALID_ARGUMENT", violations={"a": "must be b"}).document())
    assert not problem.is_valid({"title": "x"})


@pytest.mark.parametrize(
    "method", [each for each in SAID.methods if not each.client_streaming], ids=lambda each: each.name
)
def test_what_clients_make_of_the_document_is_understood(method: MethodDescriptor) -> None:
    service = method.containing_service.full_name.partition(".")[0]
    operation = schemathesis.openapi.from_dict(DOCUMENT)[f"/v1/{service}/{method.name}"]["POST"]
    validator, request = SCHEMAS.validator(method.input_type), GetMessageClass(method.input_type)

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=12)
    @given(operation.as_strategy())
    def check(case: Any) -> None:
        assert validator.is_valid(case.body)
        to_message(case.body, request())

    check()


def test_services_with_schemas_of_one_name_keep_their_own() -> None:
    def part(name: str, inner: dict[str, Any]) -> tuple[list[Operation], dict[str, Any]]:
        outer = {"type": "object", "properties": {"b": {"$ref": f"{COMPONENTS}B"}}}
        reference = {"$ref": f"{COMPONENTS}A"}
        made = Operation(
            name, "Do", "a.v1.A", "unary", idempotent=False, protocol="grpc", request=reference, response={}
        )
        return [made], {"A": outer, "B": inner, "C": {"type": "null"}}

    text, number = {"type": "string"}, {"type": "integer"}
    merged, components = merge([part("x", text), part("y", number), part("z", text), part("u", {}), part("v", number)])
    assert [each.request["$ref"].removeprefix(COMPONENTS) for each in merged] == ["A", "A.2", "A", "A.3", "A.2"]
    assert {"A", "A.2", "A.3", "B", "B.2", "B.3", "C"} == components.keys()
    assert components["B.2"] == number
    assert components["A.2"]["properties"]["b"] == {"$ref": f"{COMPONENTS}B.2"}
    assert components["B.3"] == {}
