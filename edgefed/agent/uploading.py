"""Sends an update to the server, or in pieces to the object storage that the server names, and continues it.

What has arrived counts, as the server says: a connection that breaks costs the bytes in flight, at most a piece.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from edgefed.agent.cache import OnBytes
from edgefed.agent.channel import Channel
from edgefed.agent.network import Transfer
from edgefed.agent.object_storage import ObjectStorage
from edgefed.disk import disk_errors
from edgefed.errors import ChecksumMismatch, ObjectStorageError, OffsetMismatch, ProtocolError
from edgefed.protocol import routes
from edgefed.protocol.messages import UploadState

logger = logging.getLogger("edgefed.agent")

MAX_STALLS = 3
"""Uploads in a row that the server answers without taking a byte, before that is an error."""
MIN_PIECE_BYTES = 64 * 1024
"""Smallest request that an upload is split into when a proxy limits the size of a request."""


class Uploader:
    """Sends files over one channel. Thread-safe."""

    def __init__(self, channel: Channel, storage: ObjectStorage) -> None:
        self._channel, self._storage = channel, storage
        self._piece_bytes: int | None = None

    def send(
        self,
        route: str,
        path: Path,
        ask: Callable[[int | None], UploadState],
        on_bytes: OnBytes | None = None,
        on_offset: OnBytes | None = None,
    ) -> None:
        """Send what the server lacks of ``path``. See `AggregatorClient.upload`. ``ask(size)``: how much it has.

        Where a proxy refuses a large request (HTTP 413), the upload is split into smaller ones.
        """
        with disk_errors(path):
            size = path.stat().st_size
        state, stalls = ask(size), 0
        if on_offset:
            on_offset(state.offset)
        if on_bytes and state.offset:
            on_bytes(state.offset)
        while state.status != "accepted" and state.offset != size:
            if state.offset > size:
                raise ChecksumMismatch(f"the server has {state.offset} bytes of an update of {size}")
            before, refusal = state.offset, None
            end = size if self._piece_bytes is None else min(size, before + self._piece_bytes)
            try:
                if state.urls:
                    refusal = self._put_pieces(state, path, size, on_bytes)
                    state = ask(None)
                else:
                    state = self._put(route, path, before, end, on_bytes)
            except OffsetMismatch:
                state = ask(None)
            except ProtocolError as error:
                if not self._split_after(error, end - before):
                    raise
                state = ask(None)
                continue
            if on_offset:
                on_offset(state.offset)
            stalls = 0 if state.offset > before else stalls + 1
            if stalls >= MAX_STALLS and state.status != "accepted":
                raise refusal or ProtocolError(
                    f"{self._channel.base_url} answered {stalls} uploads from byte {before} of {size} without taking "
                    "any"
                )

    def _put_pieces(
        self, state: UploadState, path: Path, size: int, on_bytes: OnBytes | None
    ) -> ObjectStorageError | None:
        """Write the next pieces to object storage; returns its refusal of one, such as of an expired URL."""
        if state.piece_bytes <= 0:
            raise ProtocolError(f"the server asks for pieces of {state.piece_bytes} bytes")
        for number, url in enumerate(state.urls, state.offset // state.piece_bytes):
            begin, end = number * state.piece_bytes, min(size, (number + 1) * state.piece_bytes)
            if begin >= size:
                break
            with self._channel.up.transfer(end - begin) as pace:
                try:
                    self._storage.put(url, self._chunks(path, begin, end, pace, on_bytes), end - begin)
                except ObjectStorageError as refusal:
                    logger.debug("%s; asking for new URLs", refusal)
                    return refusal
                pace.finish()
        return None

    def _put(self, route: str, path: Path, offset: int, end: int, on_bytes: OnBytes | None) -> UploadState:
        headers = {"content-length": str(end - offset), "content-type": "application/octet-stream"}
        with self._channel.up.transfer(end - offset) as pace:
            chunks = self._chunks(path, offset, end, pace, on_bytes)
            with self._channel.exchange(
                "PUT", route, params={"offset": offset}, content=chunks, headers=headers
            ) as response:
                pace.finish()
                return self._channel.decode(response, UploadState)

    def _chunks(self, path: Path, begin: int, end: int, pace: Transfer, on_bytes: OnBytes | None) -> Iterator[bytes]:
        """Bytes [begin, end) of a file, counted as sent."""
        left = end - begin
        with disk_errors(path):
            file = open(path, "rb")  # noqa: SIM115  disk_errors must not enclose a yield: it would see socket errors
        with file:
            file.seek(begin)
            pace.start()
            while left:
                with disk_errors(path):
                    chunk = file.read(min(routes.CHUNK_BYTES, left))
                if not chunk:
                    raise ChecksumMismatch(f"{path} became {left} bytes shorter while it was sent")
                yield chunk
                left -= len(chunk)
                self._channel.count(up=len(chunk))
                pace.moved(len(chunk))
                if on_bytes:
                    on_bytes(len(chunk))

    def _split_after(self, error: ProtocolError, sent_bytes: int) -> bool:
        """Halve the size of requests after a proxy's 413. Returns False for other errors and at `MIN_PIECE_BYTES`."""
        if not (error.foreign and error.received_status == 413) or sent_bytes <= MIN_PIECE_BYTES:
            return False
        self._piece_bytes = max(MIN_PIECE_BYTES, sent_bytes // 2)
        logger.warning(
            "a proxy in front of %s refuses a request of %d bytes (HTTP 413, body limit): uploading in pieces of %d",
            self._channel.base_url, sent_bytes, self._piece_bytes,
        )  # fmt: skip
        return True
