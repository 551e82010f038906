"""Every route and header of the aggregator.

Paths are templates in Starlette's syntax; `path_for` fills them for a client.

    POST {REGISTER}      Register                 -> Registered
    POST {HEARTBEAT}     Heartbeat                -> HeartbeatReply
    POST {LEAVE}         Leave                    -> {}
    POST {COMPARISON}    Comparison               -> {}                     once, after Finished
    GET  {ASSIGNMENT}                             -> AssignmentReply        ?wait_s=20 long poll
    GET  {MANIFEST}                               -> Manifest               server_round, or "latest"
    GET  {BLOB}          Range: bytes=N-          -> the bytes of one unit or file; ?rows= a slice (`protocol.slices`),
                                                                       ?base= a change (`protocol.changes`)
                                                     ?check=1: the server compares its hash first
    PUT  {BLOB}          raw bytes                -> {}                     only what HeartbeatReply asks for
    GET  {UPLOAD}        ?size=N                  -> UploadState; an error if N bytes would be refused
    PUT  {UPLOAD}        ?offset=N, raw bytes     -> UploadState
    POST {COMMIT}        UpdateMeta               -> UpdateAccepted
    GET  {STATUS}                                 -> Status
    GET  {COVERAGE}                               -> ExpertCoverage         changes once a round
    GET  {METRICS}                                -> the run in numbers, for Prometheus
    GET  {OPENAPI}                                -> this interface as an OpenAPI document
    GET  {HEALTH}                                 -> {"status": "ok", "protocol_version": 1}
    POST {PROBE}         raw bytes, discarded     -> {"marks": [[seconds, bytes], ...]}
    GET  {PROBE}         ?bytes=N                 -> N random bytes
    GET  {PAGE}, {PAGE}page.js, ...               -> the page of the run, without any of its data

PROBE measures the line and touches no disk. A request moves at most 8 MiB in at most 30 seconds; an address has one
request at a time and 64 MiB in a minute. Beyond that it answers 429 with Retry-After. An older server answers 404.
"""

from __future__ import annotations

from urllib.parse import quote

REGISTER = "/v1/clients"
HEARTBEAT = "/v1/clients/{client_id}/heartbeat"
LEAVE = "/v1/clients/{client_id}/leave"
COMPARISON = "/v1/clients/{client_id}/comparison"
ASSIGNMENT = "/v1/clients/{client_id}/assignment"
MANIFEST = "/v1/manifests/{server_round}"
BLOB = "/v1/blobs/{sha256}"
UPLOAD = "/v1/clients/{client_id}/rounds/{server_round}/uploads/{attempt}"
COMMIT = "/v1/clients/{client_id}/rounds/{server_round}/uploads/{attempt}/commit"
STATUS = "/v1/status"
COVERAGE = "/v1/coverage"
METRICS = "/metrics"
OPENAPI = "/v1/openapi.json"
HEALTH = "/v1/health"
PROBE = "/v1/probe"
PAGE = "/"
PAGE_FILES = ("page.js", "charts.js", "page.css", "icon.svg")
"""Files beside the page. They and the page are the same for every run."""
OPEN = frozenset({HEALTH, PAGE, *(f"{PAGE}{name}" for name in PAGE_FILES)})
"""What a server with a token answers without one: nothing of it tells of the run."""

CLIENT_KEY_HEADER = "x-edgefed-client-key"
"""Secret of the client: required under /v1/clients/{client_id}; on a download it names the client that downloads."""
INSTANCE_HEADER = "x-edgefed-instance"
"""Random name of the client's process: tells two processes with one identity apart, such as a copied state folder."""
TOKEN_HEADER = "authorization"
"""``Bearer TOKEN``, or ``Invitation ID.SECRET`` of a device that joins. Signed requests of a known device need none."""
SIGNATURE_HEADER = "x-edgefed-signature"
"""See `protocol.signing`."""
TIME_HEADER = "x-edgefed-time"
"""The server's clock in milliseconds since the epoch, in an answer that refuses the time of a signed request."""

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8470
CHUNK_BYTES = 256 * 1024
"""Size of one read or write of a streaming loop."""
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest JSON body that either side reads."""


def path_for(template: str, **values: object) -> str:
    """Fill a route template; each value is percent-encoded."""
    return template.format(**{name: quote(str(value), safe="") for name, value in values.items()})
