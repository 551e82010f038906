"""Reading requests and writing answers: what all routes of the aggregator have in common."""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edgefed.aggregator.admission import parse_number
from edgefed.errors import EdgefedError, MalformedMessage, NotFound, ServerUnreachable, Unauthorized
from edgefed.protocol import routes
from edgefed.protocol.messages import encode_error, encode_message

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
DRAIN_BYTES = 8 * 1024 * 1024
DRAIN_S = 10.0
"""How much of a refused body is read, and for how long, so that its sender gets to read the answer."""
_RANGE = re.compile(r"bytes=(\d{1,16})-(\d{0,16})")

Handler = Callable[[Request], Awaitable[Response]]


class TokenGate:
    """Refuses every request without the server's token, except to HEALTH. Sits before routing: paths leak nothing."""

    def __init__(self, app: ASGIApp, token: str):
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != routes.HEALTH:
            sent = dict(scope["headers"]).get(routes.TOKEN_HEADER.encode(), b"")
            if not hmac.compare_digest(sent, self._expected):
                response = error_reply(
                    Unauthorized("this server needs a token, and the request has none or another one")
                )
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def answer_http_exception(request: Request, fault: Exception) -> Response:
    """Starlette's own refusals (no such route, wrong verb) in the protocol's form."""
    assert isinstance(fault, HTTPException)
    response = error_reply(NotFound(f"no route {request.method} {request.url.path[:200]!r}"))
    response.status_code = fault.status_code
    return response


def answer_errors(handler: Handler) -> Handler:
    """Turn every exception of a handler into an `ErrorReply`; unexpected ones are logged with their traceback."""

    @functools.wraps(handler)
    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except asyncio.CancelledError:  # the server stops, and this request did not end in time
            response = error_reply(ServerUnreachable("the server stops"))
            response.headers["connection"] = "close"
            return response
        except EdgefedError as fault:
            response = error_reply(fault)
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path[:200])
            response = error_reply(EdgefedError("the server failed; its log says why"))
        # Only bodies are drained: on a GET there is none, and to ask for it would wait until the client hangs up.
        if request.method in ("PUT", "POST") and not await drain(request):
            response.headers["connection"] = "close"
        return response

    return wrapped


def reply(message: object) -> Response:
    return Response(encode_message(message), media_type="application/json")


def error_reply(error: EdgefedError) -> Response:
    return Response(encode_error(error), error.http_status, media_type="application/json")


def identity(request: Request) -> tuple[str, str]:
    """Client id and key of a request, unchecked."""
    return request.path_params["client_id"], request.headers.get(routes.CLIENT_KEY_HEADER, "")


def upload_identity(request: Request) -> tuple[str, str, int, int]:
    """Client id, key, round and attempt. Raises MalformedMessage when the latter are no plain numbers."""
    server_round, attempt = (parse_number(request.path_params[name], name) for name in ("server_round", "attempt"))
    return (*identity(request), server_round, attempt)


def wait_seconds(request: Request) -> float:
    """How long a poll may wait, `MAX_WAIT_S` at most. Raises MalformedMessage unless it is a number from 0."""
    text = request.query_params.get("wait_s", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise MalformedMessage(f"wait_s is {text[:40]!r}, expected seconds from 0")
    return min(seconds, MAX_WAIT_S)


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """[begin, end) that a Range header asks for, None when the blob has no such bytes.

    Only ``bytes=N-`` and ``bytes=N-M`` are understood; anything else is ignored, as RFC 9110 (14.2) lets us.
    """
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None:
        return 0, size_bytes
    begin = int(found[1])
    end = min(int(found[2]) + 1, size_bytes) if found[2] else size_bytes
    return (begin, end) if begin < end else None


async def read_body(request: Request) -> bytes:
    """A JSON body. Raises MalformedMessage beyond `routes.MAX_MESSAGE_BYTES`, without reading on."""
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > routes.MAX_MESSAGE_BYTES:
            raise MalformedMessage(f"a message has at most {routes.MAX_MESSAGE_BYTES} bytes, this one has more")
        parts.append(chunk)
    return b"".join(parts)


async def batches(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join the small pieces that a socket yields into chunks that are worth a thread's while.

    What has arrived is passed on even when the connection breaks or the server stops: it need not be sent again.
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
    except (ClientDisconnect, asyncio.CancelledError) as fault:
        broken = fault
    if size:
        yield b"".join(parts)
    if broken is not None:
        raise broken


async def drain(request: Request, *, most_bytes: int = DRAIN_BYTES, most_s: float = DRAIN_S) -> bool:
    """Read the rest of a refused body, up to a limit. Returns whether all of it came."""

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
    except RuntimeError:  # Starlette's word for: the body was read to its end before
        return True


async def until_disconnect(receive: Receive) -> None:
    """Wait until the client hangs up. A response must ask: ``send`` says nothing when nobody listens any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
