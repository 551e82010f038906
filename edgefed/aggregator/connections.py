"""Limits on connections: their number, and how long a client may keep the server waiting.

A connection is a *stranger's* until one of its requests has shown the server's token or a client's key. Strangers get a
part of the file descriptors, so that some are always left for clients. When it is used up, the server closes the
stranger's connection that is oldest. Time limits apply to a request head, to pauses within a body, and to pauses of a
reader. A slow transfer goes on as long as it makes progress; a transfer that was closed can be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import ssl
import time
from asyncio import sslproto
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

RESERVED_FILES = 128
"""File descriptors that are not for connections: blobs, updates, the database, the log."""
SWEEP_S = 1.0
TLS_BUFFER_BYTES = 64 * 1024
"""asyncio's buffer of a TLS connection. Its default of 256 KiB is half the memory of a connection, and slower to
decrypt into: each record of 16 KiB is read into a new buffer of this size (1.6 GB/s; 2.2 GB/s with 64 KiB)."""


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Seconds and numbers of connections. ``at_once``: of all; ``strangers``: of those that have shown no secret."""

    at_once: int = 4096
    strangers: int = 512
    head_s: float = 10.0
    body_pause_s: float = 30.0
    read_pause_s: float = 40.0


class ConnectionGuard:
    """The open connections of a server. Belongs to its event loop."""

    def __init__(self, limits: ConnectionLimits, clock: Callable[[], float] = time.monotonic):
        self.limits, self.clock = limits, clock
        self.open: dict[GuardedProtocol, None] = {}
        """In the order of arrival."""
        self.num_closed = 0
        """Connections that were closed for a limit."""

    def admit(self, connection: GuardedProtocol) -> None:
        """Count a new connection, and close the oldest stranger if there are too many."""
        self.open[connection] = None
        strangers = [other for other in self.open if not other.known]
        if len(strangers) > self.limits.strangers or len(self.open) > self.limits.at_once:
            self.close(strangers[0], "too many connections without a token or key")

    def forget(self, connection: GuardedProtocol) -> None:
        """A connection has ended."""
        self.open.pop(connection, None)

    def close(self, connection: GuardedProtocol, reason: str, level: int = logging.WARNING) -> None:
        """End a connection at once."""
        self.num_closed += 1
        self.forget(connection)
        logger.log(level, "closing a connection: %s", reason)
        connection.transport.abort()

    async def sweep_forever(self) -> None:
        """Close connections that exceed a time limit, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in list(self.open):
                if (reason := connection.overdue(self.clock())) is not None:
                    # A client that loads its model asks for nothing after its first answer, and connects again.
                    self.close(connection, reason, logging.DEBUG if connection.idle else logging.WARNING)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 on h11, which bounds heads and trailers, under a `ConnectionGuard`."""

    guard: ConnectionGuard
    tls: ssl.SSLContext | None
    known = False
    _answered = False
    _early = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection begins: count it, and with TLS shake hands first."""
        self.logger = logger  # uvicorn's own would log every invalid request
        self.app_state = {**self.app_state, "connection": self}
        self.heard_at = self.waiting_since = self.guard.clock()
        self.head_begun = self.blocked_since = None
        self.transport = transport
        self.guard.admit(self)
        if self.tls is None:
            super().connection_made(transport)
        else:
            transport.pause_reading()  # the first bytes are for the handshake
            self._handshake = self.loop.create_task(self._shake_hands(transport, self.tls))

    async def _shake_hands(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        try:
            secure = await self.loop.start_tls(
                transport, self, tls, server_side=True, ssl_handshake_timeout=self.guard.limits.head_s
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError and time-outs are OSErrors
            secure = None
        if secure is None or transport.is_closing():
            self.guard.forget(self)
            transport.abort()
            return
        super().connection_made(secure)
        early, self._early = self._early, b""
        if early:  # arrived in one piece with the end of the handshake
            self.data_received(early)

    head_begun: float | None
    blocked_since: float | None

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self.guard.forget(self)
        if self.flow is not None:  # None before the end of a handshake
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes arrive: note when, and when a request head begins."""
        self.heard_at = self.guard.clock()
        if self.flow is None:
            self._early += data
            return
        if not self._answering and self.head_begun is None:
            self.head_begun = self.heard_at
        super().data_received(data)
        if self._answering:
            self.head_begun = None

    def on_response_complete(self) -> None:
        """The next request may come."""
        self.waiting_since, self.head_begun, self._answered = self.guard.clock(), None, True
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes."""
        self.blocked_since = self.guard.clock()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self.blocked_since = None
        super().resume_writing()

    @property
    def idle(self) -> bool:
        """Whether its client has got all answers, and asks for nothing."""
        return self._answered and not self._answering and self.head_begun is None and self.blocked_since is None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def overdue(self, now: float) -> str | None:
        """Which time limit the connection exceeds, if any."""
        limits = self.guard.limits
        if self.blocked_since is not None and now - self.blocked_since > limits.read_pause_s:
            return f"its client has read nothing for {limits.read_pause_s:.0f} s"
        if self._answering:
            waits = self.cycle.more_body and not self.flow.read_paused
            if waits and now - self.heard_at > limits.body_pause_s:
                return f"the body has not continued for {limits.body_pause_s:.0f} s"
            return None
        begun = self.waiting_since if not self.known else self.head_begun
        if begun is not None and now - begun > limits.head_s:
            return f"no complete request within {limits.head_s:.0f} s"
        return None


def guarded_protocol(guard: ConnectionGuard, tls: ssl.SSLContext | None) -> type[GuardedProtocol]:
    """The protocol class for uvicorn, bound to ``guard`` and ``tls``."""
    if tls is not None:
        # asyncio has no option for it. Python 3.11 and later read this attribute, 3.10 does not.
        sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES  # type: ignore[attr-defined]
    return type("BoundProtocol", (GuardedProtocol,), {"guard": guard, "tls": tls})


def mark_known(scope: Scope) -> None:
    """Note that the sender of this request has shown a secret, so its connection no longer counts as a stranger's."""
    connection = scope.get("state", {}).get("connection")
    if connection is not None:
        connection.known = True


def is_known(scope: Scope) -> bool:
    """Whether an earlier request on this connection has shown a secret."""
    connection = scope.get("state", {}).get("connection")
    return connection is not None and connection.known


def count_connections(scope: Scope) -> dict[str, int]:
    """Open connections of the server that got this request: those that have shown a secret, and the others."""
    connection = scope.get("state", {}).get("connection")
    open_ = list(connection.guard.open) if connection is not None else []
    known = sum(each.known for each in open_)
    return {"known": known, "stranger": len(open_) - known}


def connection_limits() -> ConnectionLimits:
    """Limits for the file descriptors that this process may open; asks the system for as many as it may have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit for sockets
        return ConnectionLimits()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ConnectionLimits().at_once + RESERVED_FILES
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses more than its own limit
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
            )
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    at_once = max(16, min(ConnectionLimits().at_once, soft - RESERVED_FILES))
    return ConnectionLimits(at_once=at_once, strangers=min(ConnectionLimits().strangers, max(8, at_once // 4)))


class EndQuietly:
    """The outermost application: what cannot be answered, or is cut off by the server's end, leaves no traceback."""

    def __init__(self, app: ASGIApp, answer: Callable[[], Any]):
        self._app, self._answer = app, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        begun = ended = False

        async def watch(message: Message) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except h11.LocalProtocolError:  # the request was invalid to its end, so it cannot be answered
            _abort(scope)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not begun:
                await self._answer()(scope, receive, send)
            elif not ended:
                _abort(scope)  # the client sees a broken transfer, and resumes it later


def _abort(scope: Scope) -> None:
    connection = scope.get("state", {}).get("connection")
    if connection is not None:
        connection.transport.abort()
