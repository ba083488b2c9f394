"""An instance of sum of a version to come: its contract has a method more, and no generated code anywhere."""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message_factory import GetMessageClass

import rollcall

FILE = descriptor_pb2.FileDescriptorProto(name="sum/v1/sum.proto", package="sum.v1", syntax="proto3")
for name, fields in {
    "AddRequest": [("num1", 5), ("num2", 5)],
    "AddResponse": [("res", 3)],
    "MultiplyRequest": [("factors", 5)],
    "MultiplyResponse": [("product", 3)],
}.items():
    message = FILE.message_type.add(name=name)
    for number, (field, kind) in enumerate(fields, start=1):
        label = 3 if field == "factors" else 1
        message.field.add(name=field, json_name=field, number=number, type=kind, label=label)
METHODS = ("Add", "Multiply")
contract = FILE.service.add(name="SumService")
for name in METHODS:
    contract.method.add(name=name, input_type=f".sum.v1.{name}Request", output_type=f".sum.v1.{name}Response")
pool = descriptor_pool.Default()
pool.AddSerializedFile(FILE.SerializeToString())
TYPES: dict[str, Any] = {
    f"{name}{end}": GetMessageClass(pool.FindMessageTypeByName(f"sum.v1.{name}{end}"))
    for name in METHODS
    for end in ("Request", "Response")
}


async def add(request: Any, _: Any) -> Any:
    return TYPES["AddResponse"](res=request.num1 + request.num2)


async def multiply(request: Any, _: Any) -> Any:
    product = 1
    for factor in request.factors:
        product *= factor
    return TYPES["MultiplyResponse"](product=product)


def add_to_server(_: Any, server: Any) -> None:
    behaviours = {"Add": add, "Multiply": multiply}
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            behaviours[name],
            request_deserializer=TYPES[f"{name}Request"].FromString,
            response_serializer=TYPES[f"{name}Response"].SerializeToString,
        )
        for name in METHODS
    }
    server.add_registered_method_handlers("sum.v1.SumService", handlers)


service = rollcall.Service("sum")
service.add(add_to_server, object())
service.run()
