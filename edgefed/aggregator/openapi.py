"""The HTTP interface as an OpenAPI 3.1 document, made from the message types, so that it cannot differ from them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import msgspec

from edgefed import __version__
from edgefed.protocol import routes
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.coverage import ExpertCoverage
from edgefed.protocol.messages import (
    AssignmentReply,
    ErrorReply,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Manifest,
    Register,
    Registered,
    Status,
    UpdateAccepted,
    UpdateMeta,
    UploadState,
)

BYTES, NOTHING = "bytes", "nothing"
"""Bodies without a message type: raw bytes, and an empty object."""
NUMBER = {"type": "integer", "minimum": 0, "maximum": 10**9 - 1}
PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "client_id": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    "server_round": NUMBER,
    "attempt": NUMBER,
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One verb of a route. ``takes`` and ``gives``: message types, or `BYTES`, `NOTHING`, or a media type.

    ``query`` {name: schema}, ``required`` names of it; ``statuses``: more successes than 200.
    """

    verb: str
    path: str
    summary: str
    takes: Any = None
    gives: Any = NOTHING
    query: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()


OFFSET = {"type": "integer", "minimum": 0, "maximum": 10**15}
OPERATIONS = (
    Operation("POST", routes.REGISTER, "Register a client, or one again.", Register, Registered),
    Operation("POST", routes.HEARTBEAT, "Say what the client is doing.", Heartbeat, HeartbeatReply),
    Operation("POST", routes.LEAVE, "Leave the run.", Leave),
    Operation("POST", routes.COMPARISON, "Report losses of the final model.", Comparison),
    Operation(
        "GET", routes.ASSIGNMENT, "What the client has to do; waits up to `wait_s` for a change.", None,
        AssignmentReply, {"wait_s": {"type": "number", "minimum": 0, "maximum": 30}},
    ),
    Operation("GET", routes.MANIFEST, "The global model at the start of a round.", None, Manifest),
    Operation(
        "GET", routes.BLOB, "The bytes of a unit or file, from an offset (Range), or some rows of it; with `base`, "
        "the change against another blob if that is less than half.", None, BYTES,
        {"rows": {"type": "string"}, "base": {"type": "string"}, "check": {"const": "1"}}, statuses=(206,),
    ),
    Operation("PUT", routes.BLOB, "Send a copy of a blob that `HeartbeatReply` asks for.", BYTES),
    Operation(
        "GET", routes.UPLOAD, "How much of an upload has arrived; with `size`, an error if the rest is refused.", None,
        UploadState, {"size": OFFSET},
    ),
    Operation("PUT", routes.UPLOAD, "Append bytes to an upload.", BYTES, UploadState, {"offset": OFFSET}, ("offset",)),
    Operation("POST", routes.COMMIT, "Complete an upload.", UpdateMeta, UpdateAccepted),
    Operation("GET", routes.STATUS, "The state of the run, its clients and its rounds.", None, Status),
    Operation("GET", routes.COVERAGE, "Which experts the clients hold and train.", None, ExpertCoverage),
    Operation("GET", routes.METRICS, "The run in numbers, for Prometheus.", None, "text/plain"),
    Operation("GET", routes.OPENAPI, "This document.", None, "application/json"),
    Operation("GET", routes.HEALTH, "Whether the server answers; needs no token.", None, "application/json"),
    Operation("POST", routes.PROBE, "Discard bytes, to measure the connection.", BYTES, "application/json"),
    Operation(
        "GET", routes.PROBE, "Random bytes, to measure the connection.", None, BYTES,
        {"bytes": {"type": "integer", "minimum": 1, "maximum": 8 * 2**20}}, ("bytes",),
    ),
    Operation("GET", routes.PAGE, "The page of the run; needs no token.", None, "text/html", statuses=(304,)),
)  # fmt: skip
"""Every operation, but for the files beside the page."""


@functools.cache
def openapi_document() -> dict[str, Any]:
    """The document."""
    kinds = [kind for each in OPERATIONS for kind in (each.takes, each.gives) if kind is not None]
    messages = [kind for kind in kinds if not isinstance(kind, str)] + [ErrorReply]
    schemas, components = msgspec.json.schema_components(messages, ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(map(repr, messages), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.verb.lower()] = _operation(operation, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgefed aggregator", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "The token of the server, if it has one."},
                "signature": {"type": "apiKey", "in": "header", "name": routes.SIGNATURE_HEADER},
                "key": {"type": "apiKey", "in": "header", "name": routes.CLIENT_KEY_HEADER},
            },
        },
    }


def _operation(operation: Operation, by_kind: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _path_schema(operation.path, name)} for name in names
    ]
    parameters += [
        {"name": name, "in": "query", "required": name in operation.required, "schema": schema}
        for name, schema in operation.query.items()
    ]
    content = _content(operation.gives, by_kind)
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    for status in operation.statuses:
        responses[str(status)] = {"description": "Not modified."} if status == 304 else responses["200"]
    error = {"application/json": {"schema": by_kind[repr(ErrorReply)]}}
    responses["default"] = {"description": "Refused.", "content": error}
    key: dict[str, list[str]] = {"key": []} if "client_id" in names else {}
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.verb.lower()}{operation.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "parameters": parameters,
        "responses": responses,
        "security": [] if operation.path in routes.OPEN else [{"token": [], **key}, {"signature": [], **key}],
    }
    if operation.takes is not None:
        found["requestBody"] = {"required": operation.takes != BYTES, "content": _content(operation.takes, by_kind)}
    return found


def _path_schema(path: str, name: str) -> dict[str, Any]:
    """A manifest's round may be "latest"; every other parameter means the same everywhere."""
    schema = PATH_PARAMETERS[name]
    return {"anyOf": [schema, {"const": "latest"}]} if path == routes.MANIFEST else schema


def _content(kind: Any, by_kind: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if kind == BYTES:
        return {"application/octet-stream": {}}
    if kind == NOTHING:
        return {"application/json": {"schema": {"type": "object"}}}
    if isinstance(kind, str):
        return {kind: {}}
    return {"application/json": {"schema": by_kind[repr(kind)]}}
