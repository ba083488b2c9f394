"""What goes wrong, as HTTP clients are told of it: application/problem+json (RFC 9457)."""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from starlette.responses import Response

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = 1  # seconds

STATUSES = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
}
"""The HTTP status of each gRPC status but OK, as google/rpc/code.proto documents it."""

_TITLES = {499: "Client Closed Request"}


class ProblemError(Exception):
    """A request is answered with a problem. `code` is the gRPC status that it stands for, where it stands for one."""

    def __init__(
        self,
        status: int,
        detail: str,
        code: str = "",
        *,
        violations: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code = status, code
        self.violations, self.headers = violations or {}, dict(headers or {})
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            self.headers.setdefault("retry-after", str(RETRY_AFTER))

    def document(self) -> dict[str, Any]:
        """Return the problem as it is sent."""
        found: dict[str, Any] = {
            "type": "about:blank",
            "title": _TITLES.get(self.status) or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": str(self),
        }
        if self.code:
            found["code"] = self.code
        if self.violations:
            found["violations"] = [
                {"field": field, "description": description} for field, description in self.violations.items()
            ]
        return found

    def response(self) -> Response:
        """Return the answer to the request."""
        body = json.dumps(self.document(), ensure_ascii=False) + "\n"  # for terminals
        return Response(body, self.status, self.headers, media_type=MEDIA_TYPE)


def of_status(code: grpc.StatusCode, detail: str, instance: str = "") -> ProblemError:
    """Return the problem that a gRPC status is to HTTP clients."""
    headers = {"rollcall-instance": instance} if instance else {}
    return ProblemError(STATUSES[code], detail or code.name, code.name, headers=headers)


def of_outcome(code: grpc.StatusCode, detail: str, instance: str = "") -> ProblemError:
    """Return the problem that the outcome of a call is, without what clients should not learn from it."""
    if code == grpc.StatusCode.UNAVAILABLE and not instance:
        # No instance has said this, but this side of the call, with names and addresses that are nobody's business.
        log.info("a call found nobody to answer it: %s", detail)
        detail = "no instance of the service could be reached; try again"
    return of_status(code, detail, instance)


def of_call(error: grpc.aio.AioRpcError, instance: str = "") -> ProblemError:
    """Return the problem that a failed gRPC call is to HTTP clients, with what it says to be wrong with the request."""
    found = of_outcome(error.code(), error.details() or "", instance)
    found.violations = _violations(error)
    return found


def _violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has all that is asked of a call
    except ValueError:  # details that are of another status than the call's
        return {}
    bad = error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        if detail.Unpack(bad):
            return {each.field: each.description for each in bad.field_violations}
    return {}
