"""What can be called now, as an OpenAPI document.

https://spec.openapis.org/oas/v3.1.1.html
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from services.gateway.problem import MEDIA_TYPE, STATUSES
from services.gateway.schema import COMPONENTS, DEFINITIONS

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a service, as it is called over HTTP. Its schemas may refer to components."""

    service: str
    """The name in the registry."""
    method: str
    """The name in the URL."""
    contract: str
    """The contract that has the method: a gRPC service's full name, or a JSON-RPC service's name."""
    kind: str
    """How its messages come: unary, server_stream, client_stream or bidi_stream."""
    idempotent: bool
    """Whether it may be called more than once for one result."""
    protocol: str
    """What the service speaks: grpc or jsonrpc."""
    request: Schema
    """The schema of the request, or of each message of the client's."""
    response: Schema
    """The schema of the answer, or of each message of the service's."""
    doc: str = ""
    """What the contract says of it, if that is known."""

    @property
    def by_websocket(self) -> bool:
        """Whether it is called over a WebSocket: its client sends messages one after the other."""
        return self.kind in ("client_stream", "bidi_stream")


# By status: what it means here. Those that a service's own status can become are all there: see problem.STATUSES.
_PROBLEMS = {
    400: "The request is none of this method's, or the service has refused it: see `violations`.",
    401: "The service wants to know who calls.",
    403: "The service does not allow it; or a page of another origin has asked for a WebSocket.",
    404: "There is no such service or method, or what was asked for is not there.",
    408: "The request was not sent in time.",
    409: "It is there already, or was changed by somebody else at the same time.",
    413: "The request is too large.",
    415: "The request is not of the type application/json, or is compressed.",
    426: "This method takes a stream of messages: call it by WebSocket, at the same URL.",
    429: "There are too many calls at present, or something that is counted is used up. Try again later.",
    431: "The headers are too large.",
    499: "The call was cancelled.",
    500: "The service failed, or the gateway.",
    501: "The service does not have the method at present.",
    503: "No instance can be called at present. Try again later.",
    504: "The call was not answered in time. It may have been carried out.",
}
_ONLY_WITH_BODY = (408, 413, 415)

_CODES = sorted(code.name for code in STATUSES)

_HEADERS: dict[str, Schema] = {
    "rollcall-instance": {
        "description": "The instance of the service that has answered, if one has.",
        "schema": {"type": "string"},
        "example": "sum-1",
    },
    "traceparent": {
        "description": "The trace that the call belongs to: https://www.w3.org/TR/trace-context/",
        "schema": {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"},
    },
    "x-request-id": {"description": "The request's id, or the one it was given.", "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 0}},
}

_PARAMETERS: dict[str, Schema] = {
    "x-request-timeout": {
        "description": "How long the caller waits: seconds, such as 1.5 or 1.5s, or milliseconds, such as 500ms. What "
        "the service calls in turn gets no more time.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,8}(\\.[0-9]{1,9})?(s|ms)?$"},
        "example": "1.5s",
    },
    "grpc-timeout": {
        "description": "The same in gRPC's form: a number, and H, M, S, m, u or n for its unit. The shorter one holds.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$"},
        "example": "1500m",
    },
    "x-request-id": {
        "description": "An id of the caller's for the request, of 1 to 128 printable ASCII characters.",
        "schema": {"type": "string"},
    },
    "traceparent": {
        "description": "The trace that the call is to belong to: https://www.w3.org/TR/trace-context/",
        "schema": {"type": "string"},
        "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    },
    "idempotency-key": {
        "description": "For methods that know it: calls with the same key are carried out once. Up to 1024 "
        "printable ASCII characters; the service may want fewer.",
        "schema": {"type": "string", "pattern": "^[ -~]*$", "maxLength": 1024},
    },
}

_PROBLEM: Schema = {
    "type": "object",
    "description": "What went wrong: https://www.rfc-editor.org/rfc/rfc9457",
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "const": "about:blank"},
        "title": {"type": "string", "description": "What the status is called."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599, "description": "The status of the answer."},
        "detail": {"type": "string", "description": "What was expected, and what was found."},
        "code": {"type": "string", "enum": _CODES, "description": "The gRPC status, if it is one."},
        "violations": {
            "type": "array",
            "description": "What is wrong with the request.",
            "items": {
                "type": "object",
                "properties": {
                    "field": {"type": "string", "description": "Where; empty for the request as a whole."},
                    "description": {"type": "string", "description": "What is expected there."},
                },
                "required": ["field", "description"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["type", "title", "status", "detail"],
}


def document(
    title: str, version: str, operations: Iterable[Operation], components: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of operations whose schemas refer to these components.

    Beside what OpenAPI has a word for, each operation has `x-rollcall`: its service, method, contract, kind, whether it
    is idempotent, its protocol; and, where messages stream, the schemas `request` and `response` of one.
    """
    found, schemas = [], dict(components)
    for each in sorted(operations, key=lambda each: (each.service, each.method)):
        request = _lifted(each.request, f"{each.service}.{each.method}-Input", schemas)
        response = _lifted(each.response, f"{each.service}.{each.method}", schemas)
        found.append(replace(each, request=request, response=response))
    return {
        "openapi": "3.1.1",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": title,
            "version": version,
            "description": "Every method of the services that are registered and public, as it can be called now.",
        },
        "tags": [{"name": name} for name in dict.fromkeys(each.service for each in found)],
        "paths": {f"/v1/{each.service}/{each.method}": _path_item(each) for each in found},
        "components": {
            "schemas": {**dict(sorted(schemas.items())), "Problem": _PROBLEM},
            "headers": _HEADERS,
            "parameters": {
                name: {"name": name, "in": "header", "required": False, **about} for name, about in _PARAMETERS.items()
            },
            "responses": {str(status): _problem(status, text) for status, text in _PROBLEMS.items()},
        },
    }


def _lifted(schema: Schema, name: str, components: dict[str, Any]) -> Schema:
    """Return a schema without definitions of its own: they become components, and get a name that begins with this one.

    References are to places in the whole document, so those to a schema's own definitions would lead nowhere.
    """
    own = {key: value for key, value in schema.items() if key != "$defs"}
    definitions = schema.get("$defs", {})
    names = {f"{DEFINITIONS}{each}": f"{COMPONENTS}{name}.{each}" for each in definitions}
    components |= {f"{name}.{each}": _renamed(definition, names) for each, definition in definitions.items()}
    lifted: Schema = _renamed(own, names)
    return lifted


def merge(
    parts: Iterable[tuple[Iterable[Operation], Mapping[str, Any]]],
) -> tuple[list[Operation], dict[str, Any]]:
    """Return the operations of several services, and one set of components for all of them.

    Services may have different schemas by the same name, of two versions of one message, say. Each but the first then
    gets another name, with a number at its end, in all that refers to it.
    """
    operations: list[Operation] = []
    merged: dict[str, Any] = {}
    for some, components in parts:
        names = _free_names(components, merged)
        references = _as_references(names)
        merged |= {names[name]: _renamed(schema, references) for name, schema in components.items()}
        for each in some:
            request, response = _renamed(each.request, references), _renamed(each.response, references)
            operations.append(replace(each, request=request, response=response))
    return operations, merged


def _free_names(components: Mapping[str, Any], merged: Mapping[str, Any]) -> dict[str, str]:
    """Return for each component the name that it gets among those that have been merged."""
    names = {name: name for name in components}
    while True:  # a schema that refers to another one of a new name is another schema, too
        references = _as_references(names)
        taken = [
            name
            for name, new in names.items()
            if new in merged and merged[new] != _renamed(components[name], references)
        ]
        if not taken:
            return names
        for name in taken:
            number = int(names[name].removeprefix(name).removeprefix(".") or 1)
            names[name] = f"{name}.{number + 1}"


def _as_references(names: Mapping[str, str]) -> dict[str, str]:
    return {COMPONENTS + old: COMPONENTS + new for old, new in names.items() if old != new}


def _renamed(schema: Any, references: Mapping[str, str]) -> Any:
    """Return a schema with other references for some."""
    if isinstance(schema, Mapping):
        return {
            key: references.get(value, value)
            if key == "$ref" and isinstance(value, str)
            else _renamed(value, references)
            for key, value in schema.items()
        }
    return [_renamed(each, references) for each in schema] if isinstance(schema, list) else schema


def _path_item(operation: Operation) -> dict[str, Any]:
    about: dict[str, Any] = {
        "service": operation.service,
        "method": operation.method,
        "contract": operation.contract,
        "kind": operation.kind,
        "idempotent": operation.idempotent,
        "protocol": operation.protocol,
    }
    if operation.kind != "unary":
        about |= {"request": operation.request, "response": operation.response}
    found: dict[str, Any] = {
        "operationId": f"{operation.service}.{operation.method}",
        "tags": [operation.service],
        "summary": f"{operation.service}.{operation.method}{_KINDS.get(operation.kind, '')}",
        "description": _description(operation),
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in _PARAMETERS],
        "x-rollcall": about,
    }
    if operation.by_websocket:
        statuses: Sequence[int] = [status for status in _PROBLEMS if status not in _ONLY_WITH_BODY]
        success = {"101": {"description": "The WebSocket is open."}}
    else:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.request}}}
        statuses = [status for status in _PROBLEMS if status != HTTPStatus.UPGRADE_REQUIRED]
        success = {"200": _success(operation)}
    problems = {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}
    found["responses"] = success | problems
    return {"get" if operation.by_websocket else "post": found}


_KINDS = {
    "server_stream": ": a stream of answers",
    "client_stream": ": a stream of messages, one answer",
    "bidi_stream": ": a stream of messages, a stream of answers",
}

_SOCKET = (
    "To be called over a WebSocket at this URL. Each text that is sent is a message, as JSON; an empty one means that "
    'there are no more. What comes back is `{"result": ...}` for each answer, then `{"end": {"instance": ...}}`, or '
    '`{"error": ...}` with a problem.'
)
_HOW = {
    "server_stream": "The answer is a stream of server-sent events, one with `data` of JSON for each message. Then "
    'comes an event `end` with `{"instance": ...}`, or an event `error` with a problem.',
    "client_stream": _SOCKET,
    "bidi_stream": _SOCKET,
}


def _description(operation: Operation) -> str:
    again = "It may be called again when it is not known to have succeeded." if operation.idempotent else ""
    of = f"`{operation.contract}`"
    return "\n\n".join(
        each for each in (operation.doc, _HOW.get(operation.kind, ""), again, f"Of the contract {of}.") if each
    )


def _success(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": operation.response}}
    headers = ["rollcall-instance", "traceparent", "x-request-id"]
    if operation.kind == "server_stream":
        content = {"text/event-stream": {"schema": _event(operation.response)}}
        headers.remove("rollcall-instance")  # it is not known when the answer begins
    return {"description": "The answer.", "headers": _header_references(headers), "content": content}


def _event(message: Schema) -> dict[str, Any]:
    """Return the schema of one event. OpenAPI 3.1 has no other place for it; from 3.2 on, `itemSchema` is."""

    def data(schema: Schema) -> dict[str, Any]:
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}

    end = {"type": "object", "properties": {"instance": {"type": "string"}}, "required": ["instance"]}
    return {
        "oneOf": [
            {
                "type": "object",
                "description": description,
                "properties": {**({"event": {"const": name}} if name else {}), "data": data(schema)},
                "required": ["event", "data"] if name else ["data"],
                "additionalProperties": False,
            }
            for name, description, schema in (
                ("", "A message.", message),
                ("end", "The last event: who has answered.", end),
                ("error", "The last event of a stream that has failed.", {"$ref": f"{COMPONENTS}Problem"}),
            )
        ]
    }


def _problem(status: int, text: str) -> dict[str, Any]:
    headers = ["rollcall-instance", "traceparent", "x-request-id"]
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers.append("retry-after")
    return {
        "description": text,
        "headers": _header_references(headers),
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{COMPONENTS}Problem"}}},
    }


def _header_references(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
