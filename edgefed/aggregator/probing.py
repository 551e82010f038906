"""The two probe routes, with which a client measures its line, and their limits.

They use no disk and no thread, and keep state for a minute: an upload is counted and discarded, a download is one block
sent repeatedly. The limits apply to an address and to the whole server, so that neither one client nor many can take
the bandwidth of the rounds.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgefed.aggregator.validate import parse_number
from edgefed.aggregator.wire import drain, error_reply, reply, until_disconnect
from edgefed.errors import MalformedMessage, NetworkError
from edgefed.protocol import probe

WINDOW_S = 60.0
LATE_S = 5.0
"""How long after `probe.MAX_PROBE_S` the last bytes may wait for a client that does not read them."""
SMALL_BYTES, SMALL_S = 64 * 1024, 1.0
"""How much of a refused body is read, so that its sender gets the answer: the first request of a measurement."""


@dataclasses.dataclass(frozen=True)
class ProbeLimits:
    """Bytes and requests within `WINDOW_S`, and concurrent requests; for one address, and for all together.

    A measurement in both directions takes at most 16 requests of 32 MiB in total.
    """

    address_bytes: int = 64 * 1024 * 1024
    address_requests: int = 48
    address_at_once: int = 1
    all_bytes: int = 256 * 1024 * 1024
    all_requests: int = 512
    all_at_once: int = 4


class ProbeLimiter:
    """Decides who may measure now. Belongs to one event loop; has at most ``limits.all_requests`` entries."""

    def __init__(self, limits: ProbeLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or ProbeLimits()
        self._clock = clock
        self._past: collections.deque[tuple[float, str, int]] = collections.deque()
        self._running: collections.Counter[str] = collections.Counter()

    @property
    def active(self) -> int:
        """Number of requests in progress."""
        return self._running.total()

    @property
    def num_entries(self) -> int:
        """Number of addresses and requests that are remembered."""
        return len(self._running) + len(self._past)

    def wait_s(self, address: str, size_bytes: int) -> float:
        """Seconds until a request of that size may run; 0 if it may run now."""
        limits, now = self._limits, self._clock()
        while self._past and self._past[0][0] <= now - WINDOW_S:
            self._past.popleft()
        if self._running[address] >= limits.address_at_once or self._running.total() >= limits.all_at_once:
            return 1.0
        own = [(begun, size) for begun, who, size in self._past if who == address]
        everyone = [(begun, size) for begun, _, size in self._past]
        return max(
            _wait(own, size_bytes, limits.address_bytes, limits.address_requests, now),
            _wait(everyone, size_bytes, limits.all_bytes, limits.all_requests, now),
        )

    @contextlib.contextmanager
    def running(self, address: str, size_bytes: int) -> Iterator[None]:
        """Count a request that runs; it is charged in full, even if it breaks."""
        self._past.append((self._clock(), address, size_bytes))
        self._running[address] += 1
        try:
            yield
        finally:
            self._running[address] -= 1
            if not self._running[address]:
                del self._running[address]


def _wait(past: list[tuple[float, int]], size_bytes: int, most_bytes: int, most_requests: int, now: float) -> float:
    """Seconds until enough of ``past``, oldest first, has left the window."""
    size, count, wait = sum(size for _, size in past), len(past), 0.0
    for begun, gone in past:
        if size + size_bytes <= most_bytes and count < most_requests:
            break
        size, count, wait = size - gone, count - 1, begun + WINDOW_S - now
    return wait


async def answer_probe_up(limiter: ProbeLimiter, request: Request) -> Response:
    """Receive and discard a body; answer when its bytes arrived. Raises MalformedMessage for an invalid length."""
    size_bytes = _size(request.headers.get("content-length"), "content-length")
    address = _address(request)
    if wait_s := limiter.wait_s(address, size_bytes):
        response = _refusal(wait_s)
        # Unlike other refused bodies, it is not read to its end: the limit protects the line.
        if not await drain(request, most_bytes=SMALL_BYTES, most_s=SMALL_S):
            response.headers["connection"] = "close"
        return response
    recorder = probe.MarkRecorder(size_bytes)

    async def take() -> None:
        async for chunk in request.stream():
            if chunk:
                recorder.arrived(len(chunk))

    # After the time limit, what has arrived is the measurement; the rest is not read.
    with limiter.running(address, size_bytes), contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(take(), probe.MAX_PROBE_S)
    response = reply({"marks": recorder.marks()})
    if recorder.size_bytes < size_bytes:
        response.headers["connection"] = "close"
    return response


async def answer_probe_down(limiter: ProbeLimiter, request: Request) -> Response:
    """Send random bytes. Raises MalformedMessage unless ``bytes`` is in 1..`probe.MAX_PROBE_BYTES`."""
    size_bytes = _size(request.query_params.get("bytes"), "bytes")
    address = _address(request)
    if wait_s := limiter.wait_s(address, size_bytes):
        return _refusal(wait_s)
    return _RandomBytes(limiter, address, size_bytes)


class _RandomBytes(Response):
    """``size_bytes`` random bytes: the same block repeatedly, which no link compresses.

    Has no content-length, so that the answer can end properly on a slow line.
    """

    def __init__(self, limiter: ProbeLimiter, address: str, size_bytes: int) -> None:
        self._limiter, self._address, self._size_bytes = limiter, address, size_bytes
        self.status_code = 200
        self.background = None
        self.body = b""
        self.media_type = "application/octet-stream"
        self.init_headers({"cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._limiter.running(self._address, self._size_bytes):
            hung_up = asyncio.ensure_future(until_disconnect(receive))
            try:
                await asyncio.wait_for(self._send(send, hung_up), probe.MAX_PROBE_S + LATE_S)
            except asyncio.TimeoutError:  # the client does not read; the server hangs up
                pass
            finally:
                hung_up.cancel()

    async def _send(self, send: Send, hung_up: asyncio.Future[None]) -> None:
        block, left = os.urandom(probe.PROBE_BLOCK_BYTES), self._size_bytes
        until = time.monotonic() + probe.MAX_PROBE_S
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while left and not hung_up.done() and time.monotonic() < until:
            await send({"type": "http.response.body", "body": block[:left], "more_body": True})
            left -= min(left, len(block))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _size(text: str | None, what: str) -> int:
    size_bytes = parse_number(text or "", what)
    if not 1 <= size_bytes <= probe.MAX_PROBE_BYTES:
        raise MalformedMessage(f"invalid {what} {size_bytes}: a probe has 1 to {probe.MAX_PROBE_BYTES} bytes")
    return size_bytes


def _address(request: Request) -> str:
    """Address that the limits apply to: one for all clients behind a router, or behind a proxy that names no client.

    It is cut, because it may come from a header.
    """
    return request.client.host[:64] if request.client else ""


def _refusal(wait_s: float) -> Response:
    seconds = math.ceil(wait_s)
    error = NetworkError(
        f"this server has measured enough for now; try again in {seconds} s",
        remedy="Wait, or use the rates of the transfers of real rounds, which are measured anyway.",
    )
    response = error_reply(error)
    response.status_code = 429
    response.headers["retry-after"] = str(seconds)
    return response
