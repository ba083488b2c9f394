"""Refusing bad input in the way that gRPC clients understand: google.rpc.BadRequest in the status's details."""

from collections.abc import Mapping
from typing import Any, NoReturn

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


async def refuse(context: Any, violations: Mapping[str, str]) -> NoReturn:
    """End a call with INVALID_ARGUMENT. `violations` maps each field at fault to what is expected of it.

    https://google.aip.dev/193
    """
    details = any_pb2.Any()
    details.Pack(
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                for field, description in violations.items()
            ]
        )
    )
    message = "; ".join(f"{field}: {description}" for field, description in violations.items())
    status = rpc_status.to_status(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=message, details=[details]))
    trailer = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
    await context.abort(status.code, status.details, trailer)
    raise AssertionError("abort() raises")
