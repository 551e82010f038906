"""A bound on request heads: uvicorn's httptools protocol has none, and a stranger without a token can send one.

Its other protocol, h11, has a bound of its own. Bodies are bounded where they are read.
"""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 512 * 1024
"""Two reads of the event loop: the first may hold the end of a body too, which is not held against the head."""


def bounded_protocol() -> type[asyncio.Protocol]:
    """The fastest HTTP/1.1 protocol that is installed, with a bound on request heads."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        return H11Protocol

    class BoundedHttpToolsProtocol(HttpToolsProtocol):
        """Hangs up on a peer whose request line and headers do not end."""

        in_head = False
        head_bytes = 0

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_head:
                self.head_bytes += len(data)
                if self.head_bytes > MAX_HEAD_BYTES:
                    logger.warning("a request head has more than %d bytes: hanging up", MAX_HEAD_BYTES)
                    self.transport.close()

        def on_message_begin(self) -> None:
            self.in_head, self.head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            super().on_headers_complete()

    return BoundedHttpToolsProtocol
