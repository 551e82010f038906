"""GET and PUT at the signed URLs of an object storage that a server names.

No header of edgefed goes there: a URL is all that is needed, and says nothing of the device. The storage is not
trusted: whatever it sends is compared with the hash that the server announced. The server is not trusted either: if it
is on the public internet, object storage at a private address is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import threading
from collections.abc import Iterator

import httpx

from edgefed.agent.addresses import find_proxy, is_public, trusted_certificates
from edgefed.errors import ObjectStorageError, ProtocolError, ServerUnreachable
from edgefed.protocol.limits import printable

logger = logging.getLogger("edgefed.agent")

_REASON = re.compile(rb"<(?:Code|Message)>([^<]{1,200})<")
EXCERPT_BYTES = 4096


class ObjectStorage:
    """Connections to the object storage of one server. Thread-safe.

    ``server_url``: address of the server. If it is https, only https URLs are used.
    """

    def __init__(self, timeout: httpx.Timeout, server_url: str) -> None:
        self._timeout, self._server = timeout, httpx.URL(server_url)
        self._lock = threading.Lock()
        self._clients: dict[str, httpx.Client] = {}

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()

    @contextlib.contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Read an object; yields the response, body unread, of status 200, 206 or 416."""
        with self._exchange("GET", url, {**headers, "accept-encoding": "identity"}, None) as response:
            yield response

    def put(self, url: str, chunks: Iterator[bytes], size_bytes: int) -> None:
        """Write an object."""
        headers = {"content-length": str(size_bytes), "content-type": "application/octet-stream"}
        with self._exchange("PUT", url, headers, chunks):
            pass

    @contextlib.contextmanager
    def _exchange(
        self, method: str, url: str, headers: dict[str, str], content: Iterator[bytes] | None
    ) -> Iterator[httpx.Response]:
        """Raises ServerUnreachable if nothing answers, ObjectStorageError for a refusal, such as an expired URL."""
        client, host = self._client(url)
        try:
            with client.stream(method, url, headers=headers, content=content) as response:
                if not response.is_success and response.status_code != 416:
                    raise _refusal(response, host)
                yield response
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachable(f"no answer from the object storage at {host}: {reason}") from error

    def _client(self, url: str) -> tuple[httpx.Client, str]:
        """The client for a URL, and its host for messages."""
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            parsed = httpx.URL("")
        secure = self._server.scheme == "https"
        if parsed.scheme not in (("https",) if secure else ("http", "https")) or not parsed.host:
            expected = "https" if secure else "http or https"
            raise ProtocolError(f"the server names an invalid URL of object storage, expected {expected}")
        origin = f"{parsed.scheme}://{parsed.netloc.decode('ascii', 'replace').rpartition('@')[2]}"
        with self._lock:
            client = self._clients.get(origin)
            if client is None:
                verify: ssl.SSLContext | bool = False
                if parsed.scheme == "https":
                    verify = trusted_certificates(os.environ)
                proxy = find_proxy(origin, os.environ)
                if proxy is None and is_public(self._server.host) and not is_public(parsed.host):
                    raise ProtocolError(
                        f"the server at {self._server.host} is on the internet, but its object storage at "
                        f"{printable(parsed.host)} is not",
                        remedy="If both are yours, give `join` an address of the server in your own network.",
                    )
                logger.info("the model and updates move through the object storage at %s", printable(parsed.host))
                client = self._clients[origin] = httpx.Client(
                    timeout=self._timeout, verify=verify, follow_redirects=False, trust_env=False,
                    proxy=proxy.url if proxy else None,
                )  # fmt: skip
        return client, printable(parsed.host)


def _refusal(response: httpx.Response, host: str) -> ObjectStorageError:
    body = b""
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= EXCERPT_BYTES:
            break
    reason = ", ".join(printable(found.decode("utf-8", "replace")) for found in _REASON.findall(body[:EXCERPT_BYTES]))
    return ObjectStorageError(
        f"the object storage at {host} answers HTTP {response.status_code}{f': {reason}' if reason else ''}",
        remedy="This device tries again by itself with a new URL. If it goes on, see the server's log.",
    )
