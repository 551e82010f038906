"""HTTP exchanges with one aggregator: address, headers, timeouts, byte counts, and errors of `edgefed.errors`."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping

import httpx

from edgefed.agent.addresses import (
    check_base_url,
    check_scheme,
    find_proxy,
    parse_link,
    pinned_context,
    trusted_certificates,
)
from edgefed.agent.network import Throughput, TransferRates
from edgefed.errors import (
    ConfigError,
    EdgefedError,
    MalformedMessage,
    NetworkError,
    ProtocolError,
    ServerUnreachable,
    StaleRequest,
    StorageError,
)
from edgefed.protocol import routes
from edgefed.protocol.limits import printable, printable_message
from edgefed.protocol.messages import Manifest, T, decode_error, decode_message, encode_message
from edgefed.protocol.signing import STREAM, Signer, body_digest

BUSY_STATUSES = (408, 425, 429)
"""Answers after which a client should try again; so is every 5xx. 425: the time of a signed request (RFC 8470)."""
PROBLEM_EXCERPT_BYTES = 64 * 1024
SERVER_DISK_REMEDY = "Free space or check the disk on the server; clients continue by themselves."


def _check_token(token: str) -> str:
    if not token.isascii() or not token.isprintable() or token != token.strip():
        raise ConfigError("a token is printable ASCII without blanks at its ends, because it travels in an HTTP header")
    return token


class RequestSigner(httpx.Auth):
    """Signs each request with the device's key (`protocol.signing`), by the server's clock where that differs."""

    def __init__(self, key: str) -> None:
        self._signer = Signer(key)
        self.run_id = ""
        """The run that the device has joined; "" before."""
        self._ahead_ms = 0

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign; once more if the server refuses the time and the body is still there."""
        try:
            digest = body_digest(request.content)
        except httpx.RequestNotRead:
            digest = STREAM
        self._sign(request, digest)
        response = yield request
        server_ms = response.headers.get(routes.TIME_HEADER, "")
        if response.status_code == StaleRequest.http_status and server_ms.isascii() and server_ms.isdigit():
            self._ahead_ms = int(server_ms[:15]) - round(1000 * time.time())
            if digest != STREAM:
                self._sign(request, digest)
                yield request

    def _sign(self, request: httpx.Request, digest: str) -> None:
        now_ms = round(1000 * time.time()) + self._ahead_ms
        target = request.url.raw_path.decode("ascii")
        run_id = "" if target == routes.REGISTER else self.run_id
        request.headers[routes.SIGNATURE_HEADER] = self._signer.header(run_id, request.method, target, now_ms, digest)


class Channel:
    """A pool of connections to one aggregator. Thread-safe.

    ``bytes_up`` and ``bytes_down`` count bodies without headers. Code that streams a body counts it with `count`, and
    reports its pace to ``up`` or ``down``.
    """

    def __init__(
        self,
        base_url: str,
        client_key: str,
        token: str | None,
        *,
        instance: str = "",
        device_key: str = "",
        invitation: str = "",
        connect_s: float,
        read_s: float,
        write_s: float,
        verify: ssl.SSLContext | bool,
    ) -> None:
        link = parse_link(base_url)
        pin, invitation = link.pin, link.invitation or invitation
        self.base_url = check_base_url(link.address)
        self.timeout = httpx.Timeout(connect=connect_s, read=read_s, write=write_s, pool=connect_s)
        # A Range counts bytes of the blob itself, so the answer must not be compressed.
        headers = {"accept-encoding": "identity"}
        if client_key:
            headers[routes.CLIENT_KEY_HEADER] = client_key
        if instance:
            headers[routes.INSTANCE_HEADER] = instance
        if invitation:
            headers[routes.TOKEN_HEADER] = f"Invitation {_check_token(invitation)}"
        elif token:
            headers[routes.TOKEN_HEADER] = f"Bearer {_check_token(token)}"
        self.signer = RequestSigner(device_key) if device_key else None
        self._proxy = find_proxy(self.base_url, os.environ)
        if not self.base_url.startswith("https:"):
            verify = False  # loading certificate authorities takes 50 ms and megabytes; no redirect leads to https
        elif pin:
            verify = pinned_context(pin)
        elif verify is True:
            verify = trusted_certificates(os.environ)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            auth=self.signer,
            timeout=self.timeout,
            verify=verify,
            follow_redirects=False,
            trust_env=False,
            proxy=self._proxy.url if self._proxy else None,
        )
        self._lock = threading.Lock()
        self._scheme_checked = self._proxy is not None
        self.bytes_up = 0
        self.bytes_down = 0
        self.up, self.down = Throughput(), Throughput()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    @property
    def rates(self) -> TransferRates:
        """Pace of the transfers so far."""
        return TransferRates(self.up.bytes_per_s, self.down.bytes_per_s)

    def count(self, *, up: int = 0, down: int = 0) -> None:
        """Add to the byte counts."""
        with self._lock:
            self.bytes_up += up
            self.bytes_down += down

    def ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        message: object = None,
        *,
        params: Mapping[str, float | str] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> T:
        """Send ``message``, if any, and decode the answer as ``kind``."""
        content, headers = None, {}
        if message is not None:
            content, headers = encode_message(message), {"content-type": "application/json"}
            self.count(up=len(content))
        with self.exchange(method, path, params=params, content=content, headers=headers, timeout=timeout) as response:
            return self.decode(response, kind)

    @contextlib.contextmanager
    def exchange(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, float | str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        headers: dict[str, str],
        timeout: httpx.Timeout | None = None,
        passed: tuple[int, ...] = (),
    ) -> Iterator[httpx.Response]:
        """Send a request and yield the response, body unread, if it succeeded or its status is in ``passed``."""
        try:
            with self._http.stream(
                method, path, params=params, content=content, headers=headers, timeout=timeout or self.timeout
            ) as response:
                self._scheme_checked = True
                if (coding := response.headers.get("content-encoding", "identity")) != "identity":
                    raise self._compressed(response, coding)
                if not response.is_success and response.status_code not in passed:
                    raise self._refusal(response)
                yield response
        except httpx.HTTPError as error:
            if not self._scheme_checked and not isinstance(error, httpx.TimeoutException):
                self._scheme_checked = True
                check_scheme(self.base_url)
            raise connection_error(error, f"{self.base_url}{self._by_proxy()}") from error

    def decode(self, response: httpx.Response, kind: type[T]) -> T:
        """Decode an answer. Raises MalformedMessage for JSON of another message; for other content see `foreign`."""
        body = self._read(response, routes.MAX_MESSAGE_BYTES)
        try:
            message = decode_message(body, kind)
            return message if kind is Manifest else printable_message(message)
        except MalformedMessage:
            if "json" in response.headers.get("content-type", ""):
                raise
            raise self.foreign(response, body) from None

    def _read(self, response: httpx.Response, limit: int) -> bytes:
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > limit:
                raise MalformedMessage(f"{self.base_url} sent a message of more than {limit} bytes")
        self.count(down=len(body))
        return bytes(body)

    def _refusal(self, response: httpx.Response) -> EdgefedError:
        """The error that an unsuccessful response stands for.

        Its ``received_status`` is the HTTP status, for `backoff.is_transient`; ``retry_after`` is that header.
        """
        body = b""
        error: EdgefedError
        try:
            body = self._read(response, PROBLEM_EXCERPT_BYTES)
            error = printable_error(decode_error(body))
        except MalformedMessage:
            if response.status_code < 500 and response.status_code not in BUSY_STATUSES:
                return self.foreign(response, body)
            error = ServerUnreachable(f"{self.base_url} answered HTTP {response.status_code} without an explanation")
        if isinstance(error, StorageError):
            error = type(error)(f"the server {self.base_url} reports: {error}", remedy=SERVER_DISK_REMEDY)
        error.received_status = response.status_code
        error.retry_after = response.headers.get("retry-after", "")
        return error

    def _compressed(self, response: httpx.Response, coding: str) -> ProtocolError:
        """The error for an answer that is compressed although this client asks for none: it could be of any size."""
        error = ProtocolError(
            f"{self.base_url}{self._by_proxy()} sends a compressed answer ({printable(coding[:40])})",
            remedy="Switch off compression in the proxy in front of the server.",
        )
        error.foreign, error.received_status = True, response.status_code
        return error

    def foreign(self, response: httpx.Response, body: bytes) -> ProtocolError:
        """The error for an answer that no aggregator gives; its attribute ``foreign`` is for `backoff.is_transient`."""
        kind = printable(response.headers.get("content-type", "no content type")[:80])
        excerpt = " ".join(printable(body[:80].decode("utf-8", "replace")).split())
        if response.status_code == 413:
            error = ProtocolError(
                f"a proxy in front of {self.base_url} refuses the size of a request (HTTP 413)",
                remedy="Raise the body limit of the proxy (nginx: client_max_body_size), or bypass it.",
            )
            error.foreign, error.received_status = True, response.status_code
            return error
        error = ProtocolError(
            f"{self.base_url}{self._by_proxy()} does not answer as an edgefed server: HTTP {response.status_code}, "
            f"{kind}, {excerpt!r}",
            remedy="Check host and port. Another program or a proxy may have answered.",
        )
        error.foreign = True
        return error

    def _by_proxy(self) -> str:
        return f" through {self._proxy.describe()}" if self._proxy else ""


def printable_error(error: EdgefedError) -> EdgefedError:
    """An error of the server with texts that a terminal can show."""
    return type(error)(printable(str(error)), remedy=printable(error.remedy), offset=error.offset)


def connection_error(error: httpx.HTTPError, server: str) -> EdgefedError:
    """The edgefed error for a failed request to ``server``: an untrusted certificate, or no answer."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            untrusted = NetworkError(
                f"the certificate of {server} is not trusted: {cause.verify_message}",
                remedy="Use the whole address that the server prints, with its #sha256 part, or set SSL_CERT_FILE to "
                "the certificate of the authority that signed the server's.",
            )
            untrusted.foreign = True
            return untrusted
        cause = cause.__cause__ or cause.__context__
    return ServerUnreachable(f"no answer from {server}: {str(error) or type(error).__name__}")


def range_start(response: httpx.Response) -> int | None:
    """First byte of a ``Content-Range: bytes 5-9/10`` header; None if it is missing or invalid."""
    unit, _, span = response.headers.get("content-range", "").partition(" ")
    start = span.partition("-")[0]
    return int(start) if unit == "bytes" and start.isascii() and start.isdigit() else None
