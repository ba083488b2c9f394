"""person, over the wire."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from contracts.person.v1 import person_pb2, person_pb2_grpc
from services.person.handler import Person

LEAST, MOST = -(2**31), 2**31 - 1
OLDEST = MOST - 666


async def do(name: str, age: int) -> person_pb2.Person:
    server = grpc.aio.server()
    person_pb2_grpc.add_PersonServiceServicer_to_server(Person(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            return await person_pb2_grpc.PersonServiceStub(channel).Do(person_pb2.Person(name=name, age=age))
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("name", "age", "older"), [("jq", 0, 666), ("李白", 333, 999), (" ", 1, 667), ("n" * 100_000, OLDEST, MOST)]
)
def test_do(name: str, age: int, older: int) -> None:
    answer = asyncio.run(do(name, age))
    assert (answer.name, answer.age) == (f"{name} is sleeping", older)


@pytest.mark.parametrize(
    ("name", "age", "fields"),
    [
        ("", 1, {"name": "must not be empty"}),
        ("jq", -1, {"age": f"must be from 0 to {OLDEST}, found -1"}),
        ("jq", OLDEST + 1, {"age": f"must be from 0 to {OLDEST}, found {OLDEST + 1}"}),
        ("jq", MOST, {"age": f"must be from 0 to {OLDEST}, found {MOST}"}),
        ("", LEAST, {"name": "must not be empty", "age": f"must be from 0 to {OLDEST}, found {LEAST}"}),
    ],
)
def test_bad_input_is_refused_field_by_field(name: str, age: int, fields: dict[str, str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(do(name, age))
    error = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert all(f"{field}: {expected}" in (error.details() or "") for field, expected in fields.items())
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of it
    assert status is not None
    (detail,) = status.details
    refused = error_details_pb2.BadRequest()
    assert detail.Unpack(refused)
    assert {each.field: each.description for each in refused.field_violations} == fields
