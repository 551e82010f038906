"""The two probe routes: bytes that a client moves only to measure its line, and the limits on them.

No disk, no thread and no state beyond a minute: an upload is counted and thrown away, a download is one block sent
again and again. The limits hold for an address and for the whole server, so that neither one client nor many can take
the bandwidth that the rounds need.
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

from edgefed.aggregator.admission import parse_number
from edgefed.aggregator.wire import drain, error_reply, reply, until_disconnect
from edgefed.errors import MalformedMessage, NetworkError
from edgefed.protocol import probe

WINDOW_S = 60.0
LATE_S = 5.0
"""After `probe.MAX_PROBE_S`, how long the last bytes may wait for a client that does not read them."""
SMALL_BYTES, SMALL_S = 64 * 1024, 1.0
"""How much of a refused body is read so that its sender gets the answer: the first request of a measurement."""


@dataclasses.dataclass(frozen=True)
class ProbeLimits:
    """Bytes and requests within `WINDOW_S`, and requests at the same time; of one address, and of all together.

    A measurement in both directions is at most 16 requests of 32 MiB altogether.
    """

    address_bytes: int = 64 * 1024 * 1024
    address_requests: int = 48
    address_at_once: int = 1
    all_bytes: int = 256 * 1024 * 1024
    all_requests: int = 512
    all_at_once: int = 4


class ProbeLimiter:
    """Decides who may measure now. Belongs to one event loop; holds at most ``limits.all_requests`` entries."""

    def __init__(self, limits: ProbeLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or ProbeLimits()
        self._clock = clock
        self._past: collections.deque[tuple[float, str, int]] = collections.deque()
        self._running: collections.Counter[str] = collections.Counter()

    def wait_s(self, address: str, size_bytes: int) -> float:
        """Seconds until a request of that size may be asked again; 0 when it may run now."""
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
        """Enter a request that may run, whatever becomes of it; it is charged in full."""
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
    """Take a body, throw it away, and say when its bytes came. Raises MalformedMessage without a fitting length."""
    size_bytes = _size(request.headers.get("content-length"), "content-length")
    address = _address(request)
    if wait_s := limiter.wait_s(address, size_bytes):
        response = _refusal(wait_s)
        # Not read to its end as other refused bodies are: the limit is there to spare the line.
        if not await drain(request, most_bytes=SMALL_BYTES, most_s=SMALL_S):
            response.headers["connection"] = "close"
        return response
    recorder = probe.MarkRecorder(size_bytes)

    async def take() -> None:
        async for chunk in request.stream():
            if chunk:
                recorder.arrived(len(chunk))

    # After a timeout, what came by then is the measurement, and the rest is not wanted.
    with limiter.running(address, size_bytes), contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(take(), probe.MAX_PROBE_S)
    response = reply({"marks": recorder.marks()})
    if recorder.size_bytes < size_bytes:
        response.headers["connection"] = "close"
    return response


async def answer_probe_down(limiter: ProbeLimiter, request: Request) -> Response:
    """Send random bytes, as many as asked. Raises MalformedMessage unless ``bytes`` is 1..`probe.MAX_PROBE_BYTES`."""
    size_bytes = _size(request.query_params.get("bytes"), "bytes")
    address = _address(request)
    if wait_s := limiter.wait_s(address, size_bytes):
        return _refusal(wait_s)
    return _RandomBytes(limiter, address, size_bytes)


class _RandomBytes(Response):
    """``size_bytes`` random bytes: the same block again and again, which no link compresses.

    Without a length, so that a line which is too slow for it gets a proper end in time.
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
            except asyncio.TimeoutError:  # it does not read at all; the server hangs up
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
        raise MalformedMessage(f"{what} is {size_bytes}, a probe has 1 to {probe.MAX_PROBE_BYTES} bytes")
    return size_bytes


def _address(request: Request) -> str:
    """Who asks, as far as limits go: everybody behind one router, and behind a reverse proxy that does not say for whom
    it asks, shares one place. A header may have set it, so it is cut.
    """
    return request.client.host[:64] if request.client else ""


def _refusal(wait_s: float) -> Response:
    seconds = math.ceil(wait_s)
    error = NetworkError(
        f"this server has measured enough for now; it may be asked again in {seconds} s",
        remedy="Wait that long, or plan with the transfers of real rounds, which are measured on the side.",
    )
    response = error_reply(error)
    response.status_code = 429
    response.headers["retry-after"] = str(seconds)
    return response
