"""One HTTP exchange with the aggregator: address, headers, timeouts, byte counts, failures by their edgefed name."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator

import httpx

from edgefed.agent.tcp_info import ConnectionRecord
from edgefed.agent.throughput import TINY_BYTES, Throughput
from edgefed.errors import (
    ConfigError,
    EdgefedError,
    MalformedMessage,
    NetworkError,
    ProtocolError,
    ServerUnreachable,
)
from edgefed.protocol import routes
from edgefed.protocol.messages import T, decode_error, decode_message, encode_message

BUSY_STATUSES = (408, 429)
"""What a proxy answers when asking again is the thing to do; every 5xx counts, too."""
PROBLEM_EXCERPT_BYTES = 64 * 1024


def check_base_url(text: str) -> str:
    """Return ``text`` as scheme://host[:port].

    Raises ConfigError: neither http nor https, no host, a path, a query or a password.
    """
    remedy = f"Pass the address that `edgefed serve` prints, such as http://192.168.1.5:{routes.DEFAULT_PORT}."
    if "://" not in text:
        raise ConfigError(f"the server's address must begin with http:// or https://, found {text!r}", remedy=remedy)
    try:
        url = httpx.URL(text.strip())
    except (httpx.InvalidURL, ValueError) as fault:
        raise ConfigError(f"{text!r} is no address: {fault}", remedy=remedy) from fault
    if url.scheme not in ("http", "https"):
        raise ConfigError(f"the server's address must begin with http:// or https://, found {text!r}", remedy=remedy)
    if not url.host or "%" in url.host or (url.port is not None and not 0 < url.port < 65536):
        raise ConfigError(f"the server's address needs a host, and a port of 1..65535, found {text!r}", remedy=remedy)
    if url.userinfo:  # not repeated in the message: it is a secret
        raise ConfigError("the server's address holds a user name or password; use `token`", remedy=remedy)
    if url.path != "/" or url.query or url.fragment:
        raise ConfigError(f"the server's address ends after host and port, found {text!r}", remedy=remedy)
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _check_token(token: str) -> str:
    if not token.isascii() or not token.isprintable() or token != token.strip():
        raise ConfigError("a token is printable ASCII without blanks at its ends, because it travels in an HTTP header")
    return token


class Channel:
    """A pool of connections to one aggregator. Thread-safe.

    ``bytes_up`` and ``bytes_down`` count bodies without headers; whoever streams a body counts it with `count`, and
    tells ``up`` or ``down`` of its pace. ``connections`` is asked of the kernel after every exchange.
    """

    def __init__(
        self,
        base_url: str,
        client_key: str,
        token: str | None,
        *,
        connect_s: float,
        read_s: float,
        write_s: float,
        verify: ssl.SSLContext | bool,
    ) -> None:
        self.base_url = check_base_url(base_url)
        self.timeout = httpx.Timeout(connect=connect_s, read=read_s, write=write_s, pool=connect_s)
        # A compressed answer would have other offsets than the blob that a Range counts in.
        headers = {"accept-encoding": "identity"}
        if client_key:
            headers[routes.CLIENT_KEY_HEADER] = client_key
        if token:
            headers[routes.TOKEN_HEADER] = f"Bearer {_check_token(token)}"
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=self.timeout,
            # Loading the authorities takes 50 ms and megabytes; redirects are not followed, so http stays http.
            verify=verify if self.base_url.startswith("https:") else False,
            follow_redirects=False,
        )
        self._lock = threading.Lock()
        self.bytes_up = 0
        self.bytes_down = 0
        self.up, self.down = Throughput(), Throughput()
        self.connections = ConnectionRecord()

    def close(self) -> None:
        self._http.close()

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
        params: dict[str, float] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> T:
        """Send a message, or nothing, and decode the answer as ``kind``."""
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
        params: dict[str, float] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        headers: dict[str, str],
        timeout: httpx.Timeout | None = None,
        passed: tuple[int, ...] = (),
    ) -> Iterator[httpx.Response]:
        """Send a request; hand out the response, body unread, when it succeeded or its status is in ``passed``."""
        try:
            with self._http.stream(
                method, path, params=params, content=content, headers=headers, timeout=timeout or self.timeout
            ) as response:
                try:
                    if not response.is_success and response.status_code not in passed:
                        raise self._refusal(response)
                    yield response
                finally:
                    stream = response.extensions.get("network_stream")
                    sent_bytes = int(headers.get("content-length", "0"))
                    self.connections.note(
                        stream.get_extra_info("socket") if stream else None, sending=sent_bytes >= TINY_BYTES
                    )
        except httpx.HTTPError as fault:
            raise self._unreachable(fault) from fault

    def decode(self, response: httpx.Response, kind: type[T]) -> T:
        """Read an answer. Raises MalformedMessage when it is JSON, but another message; otherwise see `foreign`."""
        body = self._read(response, routes.MAX_MESSAGE_BYTES)
        try:
            return decode_message(body, kind)
        except MalformedMessage:
            if "json" in response.headers.get("content-type", ""):
                raise
            raise self.foreign(response, body) from None

    def _read(self, response: httpx.Response, limit: int) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > limit:
                raise MalformedMessage(f"{self.base_url} sent a message of more than {limit} bytes")
        self.count(down=len(body))
        return bytes(body)

    def _refusal(self, response: httpx.Response) -> EdgefedError:
        """What a response without success means. ``received_status`` tells `backoff.is_transient` the status,
        ``retry_after`` is that header as it came.
        """
        body = b""
        try:
            body = self._read(response, PROBLEM_EXCERPT_BYTES)
            error = decode_error(body)
        except MalformedMessage:
            if response.status_code < 500 and response.status_code not in BUSY_STATUSES:
                return self.foreign(response, body)
            error = ServerUnreachable(f"{self.base_url} answered HTTP {response.status_code} and nothing more")
        error.received_status = response.status_code  # type: ignore[attr-defined]
        error.retry_after = response.headers.get("retry-after", "")  # type: ignore[attr-defined]
        return error

    def foreign(self, response: httpx.Response, body: bytes) -> ProtocolError:
        """Something answered that is no aggregator. ``foreign`` tells `backoff.is_transient`."""
        kind = response.headers.get("content-type", "no content type")
        excerpt = " ".join(body[:80].decode("utf-8", "replace").split())
        error = ProtocolError(
            f"{self.base_url} answers, but not as an edgefed aggregator: "
            f"HTTP {response.status_code}, {kind}, {excerpt!r}",
            remedy="Check host and port: another program may listen there, or a proxy may be in the way.",
        )
        error.foreign = True  # type: ignore[attr-defined]
        return error

    def _unreachable(self, fault: httpx.HTTPError) -> EdgefedError:
        cause: BaseException | None = fault
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                error = NetworkError(
                    f"the certificate of {self.base_url} is not trusted: {cause.verify_message}",
                    remedy="Let SSL_CERT_FILE name the file of the authority that signed the server's certificate.",
                )
                error.foreign = True  # type: ignore[attr-defined]
                return error
            cause = cause.__cause__ or cause.__context__
        return ServerUnreachable(f"no answer from {self.base_url}: {fault or type(fault).__name__}")
