"""Reading requests and writing answers, for all routes of the aggregator."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from edgefed.aggregator.validate import parse_number
from edgefed.errors import EdgefedError, MalformedMessage, NotFound, ServerUnreachable, StorageError
from edgefed.protocol import routes
from edgefed.protocol.messages import encode_error, encode_message
from edgefed.protocol.slices import SliceFile

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
DRAIN_BYTES = 8 * 1024 * 1024
DRAIN_S = 10.0
"""How much of a refused body is read, and for how long. Otherwise its sender would not read the answer."""
BODY_S = 30.0
"""Time limit of a message; uploads are limited by their pauses instead."""
STORAGE_LOG_S = 60.0
"""A route logs an error of the disk at most this often."""
_RANGE = re.compile(r"bytes=(\d{1,16})-(\d{0,16})")

Handler = Callable[[Request], Awaitable[Response]]


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such route, wrong verb) in the protocol's form."""
    assert isinstance(error, HTTPException)
    response = error_reply(NotFound(f"no route {request.method} {request.url.path[:200]!r}"))
    response.status_code = error.status_code
    return response


def answer_errors(handler: Handler) -> Handler:
    """Turn every exception of a handler into an `ErrorReply`.

    Unexpected ones are logged with their traceback, errors of the disk as a line every `STORAGE_LOG_S`.
    """
    logged_at = -STORAGE_LOG_S

    @functools.wraps(handler)
    async def wrapped(request: Request) -> Response:
        nonlocal logged_at
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # the client is gone
        except asyncio.CancelledError:  # the server stops before this request has ended
            response = error_reply(ServerUnreachable("the server stops"))
            response.headers["connection"] = "close"
            return response
        except EdgefedError as error:
            if isinstance(error, StorageError) and time.monotonic() - logged_at >= STORAGE_LOG_S:
                logged_at = time.monotonic()
                logger.error("%s: clients must wait until this is solved", error)
            response = error_reply(error)
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path[:200])
            response = error_reply(EdgefedError("the server failed; see its log"))
        # Only for bodies: on a GET there is none, and reading it would wait until the client hangs up.
        if request.method in ("PUT", "POST") and not await drain(request):
            response.headers["connection"] = "close"
        return response

    return wrapped


def reply(message: object) -> Response:
    """A message as a response."""
    return Response(encode_message(message), media_type="application/json")


def error_reply(error: EdgefedError) -> Response:
    """An error as a response."""
    return Response(encode_error(error), error.http_status, media_type="application/json")


def identity(request: Request) -> tuple[str, str]:
    """Client id and key of a request, unchecked."""
    return request.path_params["client_id"], request.headers.get(routes.CLIENT_KEY_HEADER, "")


def upload_numbers(request: Request) -> tuple[int, int]:
    """Round and attempt of an upload. Raises MalformedMessage unless they are plain numbers."""
    server_round, attempt = (parse_number(request.path_params[name], name) for name in ("server_round", "attempt"))
    return server_round, attempt


def wait_seconds(request: Request) -> float:
    """How long a poll may wait, at most `MAX_WAIT_S`. Raises MalformedMessage unless it is a number from 0."""
    text = request.query_params.get("wait_s", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise MalformedMessage(f"wait_s is {text[:40]!r}, expected seconds from 0")
    return min(seconds, MAX_WAIT_S)


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """[begin, end) of a Range header; None if the blob has no such bytes.

    Only ``bytes=N-`` and ``bytes=N-M`` are supported; anything else is ignored, as RFC 9110 (14.2) allows.
    """
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None:
        return 0, size_bytes
    begin = int(found[1])
    end = min(int(found[2]) + 1, size_bytes) if found[2] else size_bytes
    return (begin, end) if begin < end else None


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Read a JSON body. Raises MalformedMessage, and stops reading, beyond ``most_bytes`` or after `BODY_S` seconds."""
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > most_bytes:
        raise MalformedMessage(f"this message has at most {most_bytes} bytes, found {length[:20]}")

    async def read() -> bytes:
        parts, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most_bytes:
                raise MalformedMessage(f"this message has at most {most_bytes} bytes, and more arrive")
            parts.append(chunk)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError as error:
        raise MalformedMessage(f"the message has not ended after {BODY_S:.0f} s") from error


async def batches(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join the small pieces of a socket into chunks of `routes.CHUNK_BYTES`.

    The last pieces are yielded also when the connection breaks or the server stops: they need not be sent again.
    """
    parts: list[bytes] = []
    size = 0
    broken: BaseException | None = None
    try:
        async for part in stream:
            parts.append(part)
            size += len(part)
            if size >= routes.CHUNK_BYTES:
                whole, parts, size = b"".join(parts), [], 0
                yield whole
    except (ClientDisconnect, asyncio.CancelledError) as error:
        broken = error
    if size:
        yield b"".join(parts)
    if broken is not None:
        raise broken


async def drain(request: Request, *, most_bytes: int = DRAIN_BYTES, most_s: float = DRAIN_S) -> bool:
    """Read the rest of a refused body, up to a limit. Returns whether all of it arrived."""

    async def read() -> bool:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most_bytes:
                return False
        return True

    try:
        return await asyncio.wait_for(read(), most_s)
    except (ClientDisconnect, asyncio.TimeoutError):
        return False
    except RuntimeError:  # Starlette raises it if the body was already read to its end
        return True


async def until_disconnect(receive: Receive) -> None:
    """Wait until the client hangs up. ``send`` does not report that."""
    while (await receive())["type"] != "http.disconnect":
        pass


def slice_facts(path: Path, rows: str) -> tuple[int, str]:
    """Size and hash of a slice of a blob. Raises NotFound if the blob was pruned at this moment, MalformedMessage."""
    try:
        with SliceFile(path, rows) as file:
            return file.size_bytes, file.sha256()
    except FileNotFoundError as error:
        raise NotFound(f"no stored manifest contains blob {path.name}") from error
