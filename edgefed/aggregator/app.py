"""The HTTP routes of the aggregator, on Starlette. This module translates and streams; `service` decides.

Everything that may use the disk runs in a thread; the event loop only moves bytes. Streams are read and written in
chunks of `routes.CHUNK_BYTES`, because file responses of libraries cost several times the processor time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import enum
import functools
import io
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgefed.aggregator.blobs import ChangeCache
from edgefed.aggregator.connections import EndQuietly, count_connections, mark_known
from edgefed.aggregator.gate import Gate, credentials_of
from edgefed.aggregator.metrics import MEDIA_TYPE
from edgefed.aggregator.openapi import openapi_document
from edgefed.aggregator.page import page_handlers
from edgefed.aggregator.polls import Bell, LongPolls
from edgefed.aggregator.probing import ProbeLimiter, answer_probe_down, answer_probe_up
from edgefed.aggregator.service import Service
from edgefed.aggregator.validate import parse_number
from edgefed.aggregator.wire import (
    Handler,
    answer_errors,
    answer_http_exception,
    batches,
    error_reply,
    identity,
    parse_range,
    read_body,
    reply,
    slice_facts,
    until_disconnect,
    upload_numbers,
    wait_seconds,
)
from edgefed.errors import NotFound, ProtocolError, ServerUnreachable
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.changes import CHANGE_TYPE
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import (
    AssignmentReply,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Register,
    UpdateAccepted,
    UpdateMeta,
    UploadState,
    decode_message,
    encode_error,
)
from edgefed.protocol.slices import SliceFile

MAX_OFFSET = 10**15
MAX_INSTANCE_CHARACTERS = 64
SMALL_MESSAGE_BYTES = 64 * 1024
"""Largest message other than the end of an upload."""
T = TypeVar("T")


class Work(enum.Enum):
    """Kinds of blocking work, each with its threads."""

    SMALL = "small"
    TRANSFER = "transfer"
    """Reads and writes of many bytes, which small requests must not queue behind."""
    BUCKET = "bucket"
    """Waiting for object storage, which may be slow."""
    COMMIT = "commit"
    """Hashing and checking, limited by memory and disk: more threads would slow each of them down."""


NUM_THREADS = {Work.SMALL: 8, Work.TRANSFER: 8, Work.BUCKET: 8, Work.COMMIT: 2}


class Endpoints:
    """The handlers of all routes over one service."""

    def __init__(self, service: Service, bell: Bell):
        self.service = service
        self._threads = {
            work: concurrent.futures.ThreadPoolExecutor(number, thread_name_prefix=work.value)
            for work, number in NUM_THREADS.items()
        }
        self.polls = LongPolls(bell, self.run, lambda: service.closing)
        self.probes, self.changes = ProbeLimiter(), ChangeCache(lambda sha256: self.service.blob(sha256))
        self.transfers = 0
        """Streams in progress, without probes: the server does not wait for those."""

    def routes(self) -> list[Route]:
        """Routes of Starlette, with their handlers."""
        table: list[tuple[str, str, Handler]] = [
            ("POST", routes.REGISTER, self.register),
            ("POST", routes.HEARTBEAT, self.heartbeat),
            ("POST", routes.LEAVE, self.leave),
            ("POST", routes.COMPARISON, self.comparison),
            ("GET", routes.ASSIGNMENT, self.assignment),
            ("GET", routes.MANIFEST, self.manifest),
            ("GET", routes.BLOB, self.blob),
            ("PUT", routes.BLOB, self.restore),
            ("GET", routes.UPLOAD, self.upload_state),
            ("PUT", routes.UPLOAD, self.upload),
            ("POST", routes.COMMIT, self.commit),
            ("GET", routes.STATUS, self.status),
            ("GET", routes.COVERAGE, self.coverage),
            ("GET", routes.METRICS, self.metrics),
            ("GET", routes.OPENAPI, self.openapi),
            ("GET", routes.HEALTH, self.health),
            *(("GET", path, handler) for path, handler in page_handlers().items()),
            ("POST", routes.PROBE, functools.partial(answer_probe_up, self.probes)),
            ("GET", routes.PROBE, functools.partial(answer_probe_down, self.probes)),
        ]
        return [Route(path, answer_errors(handler), methods=[verb]) for verb, path, handler in table]

    def close(self) -> None:
        """Wait for the threads to end."""
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)

    async def run(self, function: Callable[..., T], *args: object, work: Work = Work.SMALL, **options: object) -> T:
        """Run a blocking function in a thread."""
        call = functools.partial(function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads[work], call)

    async def run_for(
        self, request: Request, function: Callable[..., T], *args: object, upload: bool = False, work: Work = Work.SMALL
    ) -> T:
        """Run `call_for` in a thread."""
        return await self.run(self.call_for(request, function, *args, upload=upload), work=work)

    def call_for(
        self, request: Request, function: Callable[..., T], *args: object, upload: bool = False
    ) -> Callable[[], T]:
        """``function(client_id, key, *args)`` for the sender of a request, who is checked first.

        With ``upload``, round and attempt come before ``args``. Raises IdentityInUse if the request comes from a
        process that another one has replaced.
        """
        client_id, key = identity(request)
        numbers = upload_numbers(request) if upload else ()
        instance = request.headers.get(routes.INSTANCE_HEADER, "")[:MAX_INSTANCE_CHARACTERS]

        def call() -> T:
            self.service.check_instance(client_id, key, instance)
            self.service.check_signed(client_id, credentials_of(request.scope))
            mark_known(request.scope)
            return function(client_id, key, *numbers, *args)

        return call

    # --- clients ------------------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        """POST REGISTER."""
        message = decode_message(await read_body(request, SMALL_MESSAGE_BYTES), Register)
        registered = await self.run(self.service.register, message, credentials_of(request.scope))
        mark_known(request.scope)
        return reply(registered)

    async def heartbeat(self, request: Request) -> Response:
        """POST HEARTBEAT."""
        message = decode_message(await read_body(request, SMALL_MESSAGE_BYTES), Heartbeat)
        await self.run_for(request, self.service.heartbeat, message)
        return reply(HeartbeatReply(wanted=self.service.repairs.wanted()))

    async def leave(self, request: Request) -> Response:
        """POST LEAVE."""
        message = decode_message(await read_body(request, SMALL_MESSAGE_BYTES), Leave)
        await self.run_for(request, self.service.leave, message.reason)
        return reply({})

    async def comparison(self, request: Request) -> Response:
        """POST COMPARISON."""
        message = decode_message(await read_body(request, SMALL_MESSAGE_BYTES), Comparison)
        await self.run_for(request, self.service.compare, message)
        return reply({})

    async def assignment(self, request: Request) -> Response:
        """GET ASSIGNMENT: a long poll."""
        ask: Callable[[], AssignmentReply] = self.call_for(request, self.service.assignment)
        return reply(await self.polls.answer(ask, wait_seconds(request), request.receive))

    # --- downloads ----------------------------------------------------------------------------------------------

    async def manifest(self, request: Request) -> Response:
        """GET MANIFEST."""
        encoded = await self.run(self.service.manifest, request.path_params["server_round"])
        return Response(encoded, media_type="application/json")

    async def blob(self, request: Request) -> Response:
        """GET BLOB, whole or from an offset; with ``rows``, a slice of it; with ``base``, a change if that is less."""
        sha256 = request.path_params["sha256"]
        path, size_bytes = self.service.blob(sha256)
        rows, tag, again = request.query_params.get("rows"), sha256, "check" in request.query_params
        if again or rows is not None:
            await self.run(self.service.check_blob, sha256, again=again, work=Work.COMMIT)
        self.service.repairs.check_wanted(sha256)
        if rows is not None:
            size_bytes, tag = await self.run(slice_facts, path, rows, work=Work.TRANSFER)
        elif self.service.bucket is not None:
            first, end = parse_range(request.headers.get("range"), size_bytes) or (0, 0)
            key = request.headers.get(routes.CLIENT_KEY_HEADER, "")
            url = await self.run(self.service.blob_url, sha256, key, end - first, anew=again, work=Work.BUCKET)
            return Response(status_code=307, headers={"location": url, "cache-control": "no-store"})
        headers, key = {"accept-ranges": "bytes", "etag": f'"{tag}"'}, request.headers.get(routes.CLIENT_KEY_HEADER, "")
        if base := request.query_params.get("base"):
            change = await self.run(self.changes.between, base, sha256, work=Work.TRANSFER)
            if change is not None:
                await self.run(self.service.note_download, key, len(change), size_bytes)
                return Response(change, headers=headers, media_type=CHANGE_TYPE)
        span = parse_range(request.headers.get("range"), size_bytes)
        if span is None:
            headers["content-range"] = f"bytes */{size_bytes}"
            error = NotFound(f"blob {sha256} has {size_bytes} bytes, asked for {request.headers['range'][:80]!r}")
            return Response(encode_error(error), 416, headers, "application/json")
        begin, end = span
        if "range" in request.headers and (begin, end) != (0, size_bytes):
            headers["content-range"] = f"bytes {begin}-{end - 1}/{size_bytes}"
        try:
            file = await self.run(_open_at, path, begin, rows)
        except FileNotFoundError as error:  # its manifest was pruned at this moment
            raise NotFound(f"no stored manifest contains blob {sha256}") from error
        return FileStream(self, file, begin, end, headers, key)

    async def restore(self, request: Request) -> Response:
        """PUT BLOB: a client's copy of a blob that the server has lost."""
        await self.service.repairs.receive(request.path_params["sha256"], batches(request.stream()))
        return reply({})

    # --- uploads ------------------------------------------------------------------------------------------------

    async def upload_state(self, request: Request) -> Response:
        """GET UPLOAD; with ``size``, whether the rest would be accepted."""
        size = request.query_params.get("size")
        size_bytes = None if size is None else parse_number(size, "size", MAX_OFFSET)
        work = Work.SMALL if self.service.bucket is None else Work.BUCKET
        return reply(await self.run_for(request, self.service.upload_state, size_bytes, upload=True, work=work))

    async def upload(self, request: Request) -> Response:
        """PUT UPLOAD: append to an upload."""
        offset = parse_number(request.query_params.get("offset", ""), "offset", MAX_OFFSET)
        length = request.headers.get("content-length")
        length_bytes = None if length is None else parse_number(length, "content-length", MAX_OFFSET)
        name, writer = await self.run_for(request, self.service.open_upload, offset, length_bytes, upload=True)
        refused: ProtocolError | None = None
        self.transfers += 1
        try:
            async for chunk in batches(request.stream()):
                await self.run(writer.write, chunk, work=Work.TRANSFER)
        except ProtocolError as error:
            refused = error
            raise
        finally:
            # Also if this task is cancelled: the next connection may arrive at once.
            arrived = await asyncio.shield(self.run(self.service.close_upload, name, writer, refused=refused))
            self.transfers -= 1
        return reply(UploadState(offset=arrived, status="partial"))

    async def commit(self, request: Request) -> Response:
        """POST COMMIT."""
        await self.run_for(request, lambda *_: None)  # who it is comes before a body that may be large
        body = await read_body(request, self.service.max_meta_bytes)

        def finish(client_id: str, key: str, server_round: int, attempt: int) -> UpdateAccepted:
            return self.service.commit(client_id, key, server_round, attempt, decode_message(body, UpdateMeta))

        work = Work.COMMIT if self.service.bucket is None else Work.BUCKET  # which it copies the update from
        return reply(await self.run_for(request, finish, upload=True, work=work))

    # --- the server itself --------------------------------------------------------------------------------------

    async def status(self, request: Request) -> Response:
        """GET STATUS."""
        return reply(await self.run(self.service.status))

    async def coverage(self, request: Request) -> Response:
        """GET COVERAGE."""
        return reply(await self.run(self.service.coverage))

    async def metrics(self, request: Request) -> Response:
        """GET METRICS."""
        connections = count_connections(request.scope)
        return Response(await self.run(self.service.metrics, connections), media_type=MEDIA_TYPE)

    async def openapi(self, request: Request) -> Response:
        """GET OPENAPI."""
        return reply(openapi_document())

    async def health(self, request: Request) -> Response:
        """GET HEALTH: needs no token."""
        return reply({"status": "ok", "protocol_version": PROTOCOL_VERSION})


class FileStream(Response):
    """Bytes [begin, end) of an open file, streamed in chunks of `routes.CHUNK_BYTES`. Closes the file."""

    def __init__(
        self, endpoints: Endpoints, file: io.FileIO | SliceFile, begin: int, end: int, headers: dict[str, str], key: str
    ):
        self._endpoints, self._file, self._begin, self._end, self._key = endpoints, file, begin, end, key
        self.status_code = 206 if "content-range" in headers else 200
        self.background = None
        self.body = b""
        self.media_type = "application/octet-stream"
        self.init_headers({**headers, "content-length": str(end - begin)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the bytes."""
        run, at = self._endpoints.run, self._begin
        self._endpoints.transfers += 1
        hung_up = asyncio.ensure_future(until_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while at < self._end and not hung_up.done():
                length = min(routes.CHUNK_BYTES, self._end - at)
                chunk = _read_cached(self._file, at, length) or await run(self._file.read, length, work=Work.TRANSFER)
                if not chunk:
                    raise OSError(f"{self._file.name} ends at byte {at}, expected {self._end}")
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                at += len(chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            hung_up.cancel()
            self._file.close()
            await asyncio.shield(run(self._endpoints.service.note_download, self._key, at - self._begin))
            self._endpoints.transfers -= 1


def _open_at(path: Path, begin: int, rows: str | None) -> io.FileIO | SliceFile:
    file = io.FileIO(path) if rows is None else SliceFile(path, rows)
    file.seek(begin)
    return file


def _read_cached(file: io.FileIO | SliceFile, at: int, length: int) -> bytes:
    """Read from the page cache without waiting for the disk. Returns b"" if the data is not cached, or unknown.

    All clients download the model, so nearly every read is cached, and a thread would cost more than the read. Moves
    the file's position as a read does.
    """
    if isinstance(file, SliceFile) or not hasattr(os, "RWF_NOWAIT"):
        return b""
    buffer = bytearray(length)
    try:
        count = os.preadv(file.fileno(), [buffer], at, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: unknown on this file system
        count = 0
    file.seek(at + count)
    return bytes(memoryview(buffer)[:count])


def build_app(
    service: Service,
    bell: Bell,
    token: str | None,
    lifespan: Callable[[Endpoints], contextlib.AbstractAsyncContextManager[None]],
) -> tuple[ASGIApp, Endpoints]:
    """The ASGI application of a service. ``lifespan`` runs around it."""
    endpoints = Endpoints(service, bell)

    @contextlib.asynccontextmanager
    async def around(_: Starlette) -> AsyncIterator[None]:
        bell.attach(asyncio.get_running_loop())
        async with lifespan(endpoints):
            yield
        endpoints.close()

    app: ASGIApp = Starlette(
        routes=endpoints.routes(), lifespan=around, exception_handlers={HTTPException: answer_http_exception}
    )
    app = Gate(app, token, service.access, service.run_id)
    return EndQuietly(app, lambda: error_reply(ServerUnreachable("the server stops"))), endpoints
