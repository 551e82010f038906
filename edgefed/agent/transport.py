"""HTTP to one aggregator: one typed method per route, resumable transfers, every failure an edgefed error.

A method makes one attempt and does not wait; `backoff.Retry` repeats it. A repeated download or upload continues where
the last one ended, because `.part` files and the server's offset survive. Timeouts apply to a phase (connect, next byte
read, next byte written), never to the whole request: a slow line that still moves is not a failure.
"""

from __future__ import annotations

import logging
import secrets
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import httpx

from edgefed.agent.cache import OnBytes, PartFile, check_sha256
from edgefed.agent.channel import Channel, range_start
from edgefed.agent.network import Throughput, Transfer, TransferRates, decode_marks
from edgefed.agent.object_storage import ObjectStorage
from edgefed.agent.uploading import Uploader
from edgefed.disk import disk_errors
from edgefed.errors import ChecksumMismatch, NotFound, ObjectStorageError, ProtocolError
from edgefed.protocol import probe, routes
from edgefed.protocol.changes import CHANGE_TYPE
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.limits import check_manifest, check_run
from edgefed.protocol.messages import (
    Assignment,
    AssignmentReply,
    Finished,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Manifest,
    Register,
    Registered,
    Status,
    UpdateAccepted,
    UpdateMeta,
    UploadState,
    Wait,
)
from edgefed.protocol.slices import UnitSlice

logger = logging.getLogger("edgefed.agent")


class AggregatorClient:
    """One client's connection to one aggregator. Thread-safe; close it, or use it in a ``with``.

    ``client_id`` and ``client_key`` may be empty for requests that need no client, such as the status. ``device_key``:
    private key that signs the requests, "" for none (`protocol.signing`); ``invitation``: ``ID.SECRET``, where the
    address has none; it goes before the token. ``verify`` is an SSL context, or True for the usual authorities.
    ``bytes_up`` and ``bytes_down`` count the bodies of messages and files.

    Every method raises ServerUnreachable if no answer arrives, the server's own error if it refuses, and ProtocolError
    if something else than an edgefed server answers.
    """

    def __init__(
        self,
        base_url: str,
        client_id: str = "",
        client_key: str = "",
        token: str | None = None,
        *,
        device_key: str = "",
        invitation: str = "",
        connect_s: float = 10.0,
        read_s: float = 60.0,
        write_s: float = 60.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.client_id = client_id
        self.instance = secrets.token_hex(8)
        """Random name of this connection's process, for `routes.INSTANCE_HEADER`."""
        self._channel = Channel(
            base_url, client_key, token, instance=self.instance, device_key=device_key, invitation=invitation,
            connect_s=connect_s, read_s=read_s, write_s=write_s, verify=verify,
        )  # fmt: skip
        self._storage = ObjectStorage(self._channel.timeout, self.base_url)
        self._uploader = Uploader(self._channel, self._storage)

    @property
    def base_url(self) -> str:
        """scheme://host[:port], without a slash at the end."""
        return self._channel.base_url

    @property
    def bytes_up(self) -> int:
        """Bytes sent in bodies."""
        return self._channel.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes received in bodies."""
        return self._channel.bytes_down

    @property
    def up(self) -> Throughput:
        """Meter of uploads."""
        return self._channel.up

    @property
    def down(self) -> Throughput:
        """Meter of downloads."""
        return self._channel.down

    @property
    def rates(self) -> TransferRates:
        """Rates of the transfers so far. Costs nothing and sends nothing."""
        return self._channel.rates

    def __enter__(self) -> AggregatorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. A request that still runs in another thread fails."""
        self._channel.close()
        self._storage.close()

    def health(self) -> dict[str, str | int]:
        """What a server says to anybody: that it is there, and its protocol version."""
        return self._channel.ask("GET", routes.HEALTH, dict[str, str | int])

    # --- messages -------------------------------------------------------------------------------------------------

    def register(self, message: Register) -> Registered:
        """Introduce this client. Repeating it is harmless."""
        registered = self._channel.ask("POST", routes.REGISTER, Registered, message)
        check_run(registered.run)
        if self._channel.signer is not None:
            self._channel.signer.run_id = registered.run.run_id
        return registered

    def heartbeat(self, message: Heartbeat) -> HeartbeatReply:
        """Report that this client is alive, and what it does."""
        return self._channel.ask("POST", self._own(routes.HEARTBEAT), HeartbeatReply, message)

    def leave(self, reason: str, *, timeout_s: float = 2.0) -> None:
        """Say goodbye; each phase of the request takes at most ``timeout_s``."""
        timeout = httpx.Timeout(timeout_s)
        self._channel.ask("POST", self._own(routes.LEAVE), dict[str, object], Leave(reason=reason), timeout=timeout)

    def compare(self, comparison: Comparison) -> None:
        """Report the losses that this device compared at the end of the run."""
        self._channel.ask("POST", self._own(routes.COMPARISON), dict[str, object], comparison)

    def assignment(self, wait_s: float) -> Wait | Assignment | Finished:
        """Ask for work. The server answers at once if there is some, or after ``wait_s`` seconds at the latest."""
        reply = cast("type[AssignmentReply]", AssignmentReply)  # a union, which msgspec takes as a type
        limits = self._channel.timeout.as_dict()
        limits["read"] = wait_s + (limits["read"] or 0.0)
        return self._channel.ask(
            "GET", self._own(routes.ASSIGNMENT), reply, params={"wait_s": wait_s}, timeout=httpx.Timeout(**limits)
        )

    def manifest(self, server_round: int | str = "latest") -> Manifest:
        """The global model at the start of a round. Raises NotFound if the server has moved on."""
        manifest = self._channel.ask("GET", routes.path_for(routes.MANIFEST, server_round=server_round), Manifest)
        check_manifest(manifest)
        return manifest

    def status(self) -> Status:
        """Status of the run."""
        return self._channel.ask("GET", routes.STATUS, Status)

    def upload_state(self, server_round: int, attempt: int, size_bytes: int | None = None) -> UploadState:
        """How much of an update the server has, 0 of an unknown one. Raises its error if it refuses ``size_bytes``."""
        target, params = self._own(routes.UPLOAD, server_round, attempt), {"size": size_bytes} if size_bytes else {}
        try:
            return self._channel.ask("GET", target, UploadState, params=params)
        except NotFound:
            # Nothing has arrived, or the round is unknown; the following PUT shows which.
            return UploadState(offset=0, status="partial")

    def commit(self, meta: UpdateMeta) -> UpdateAccepted:
        """Finish an upload: when this returns, the update is safe on the server's disk. May be repeated."""
        return self._channel.ask(
            "POST", self._own(routes.COMMIT, meta.server_round, meta.attempt), UpdateAccepted, meta
        )

    # --- transfers ------------------------------------------------------------------------------------------------

    def upload(
        self,
        server_round: int,
        attempt: int,
        path: Path,
        on_bytes: OnBytes | None = None,
        on_offset: OnBytes | None = None,
    ) -> None:
        """Send the part of ``path`` that the server does not have yet; return when it has everything.

        ``on_bytes(n)`` is called for every chunk sent, and first for what the server already had; ``on_offset(offset)``
        whenever the server says how much it has. Raises ChecksumMismatch if the server has more bytes than the file,
        ProtocolError if it takes none `uploading.MAX_STALLS` times.
        """
        route = self._own(routes.UPLOAD, server_round, attempt)

        def ask(size: int | None) -> UploadState:
            return self.upload_state(server_round, attempt, size)

        self._uploader.send(route, path, ask, on_bytes, on_offset)

    def restore(self, sha256: str, path: Path) -> None:
        """Send this device's copy of a blob that the server has lost."""
        with disk_errors(path), path.open("rb") as file:
            size_bytes = path.stat().st_size
            chunks = iter(lambda: file.read(routes.CHUNK_BYTES), b"")
            headers = {"content-length": str(size_bytes), "content-type": "application/octet-stream"}
            target = routes.path_for(routes.BLOB, sha256=sha256)
            with self._channel.exchange("PUT", target, content=chunks, headers=headers):
                self._channel.count(up=size_bytes)

    def download(
        self, sha256: str, size_bytes: int, path: Path, on_bytes: OnBytes | None = None, base: Path | None = None
    ) -> None:
        """Store one blob at ``path``, durably and verified; continue from ``path``.part.

        ``base``: an earlier version, named by its hash; the server then may send what differs. After a wrong hash the
        download starts again, once. Raises ChecksumMismatch, DiskFull, NotFound.
        """
        check_sha256(sha256, size_bytes)
        part = PartFile(path, size_bytes)
        for again in (False, True):
            with part.opened():
                if part.offset < size_bytes:
                    own = None if again or part.offset else base
                    params = {"check": "1"} if again else {"base": own.name} if own else {}
                    try:
                        self._get_rest(sha256, part, on_bytes, params, own)
                    except ObjectStorageError:
                        if again:
                            raise
                        continue  # the URL has expired or the blob is gone: the server puts it there again
            if part.sha256() == sha256:
                part.publish()
                return
            found = part.offset
            part.discard()
        raise ChecksumMismatch(
            f"{self.base_url} sent other content than blob {sha256[:12]} twice: {found} bytes, expected {size_bytes}",
            remedy="The blob may be damaged on the server's disk; see the server's log.",
        )

    def download_slice(self, item: UnitSlice, path: Path, on_bytes: OnBytes | None = None) -> None:
        """As `download`, for some neurons of a blob. The answer says what its hash is."""
        check_sha256(item.unit.sha256, item.unit.size_bytes)
        part = PartFile(path, item.size_bytes)
        for _ in range(2):
            with part.opened():
                if part.offset == part.size_bytes:  # complete, but what it should be is not known any more
                    part.truncate()
                expected = self._get_rest(item.unit.sha256, part, on_bytes, {"rows": item.rows})
            if part.sha256() == expected:
                part.publish()
                return
            found = part.offset
            part.discard()
        raise ChecksumMismatch(
            f"{self.base_url} sent another slice of blob {item.unit.sha256[:12]} than it announced, twice: {found} "
            f"bytes, expected {item.size_bytes}",
            remedy="The blob may be damaged on the server's disk; see the server's log.",
        )

    def _get_rest(
        self, sha256: str, part: PartFile, on_bytes: OnBytes | None, params: Mapping[str, str], base: Path | None = None
    ) -> str:
        """Append what is missing of a blob, or of the ``rows`` in ``params``; returns the ETag of the answer."""
        headers = {"range": f"bytes={part.offset}-"} if part.offset else {}
        path, passed = routes.path_for(routes.BLOB, sha256=sha256), (307, 416)
        with self._channel.exchange("GET", path, params=params, headers=headers, passed=passed) as response:
            if response.status_code != 307:
                return self._append(response, part, on_bytes, base)
            url = response.headers.get("location", "")
        with self._storage.get(url, headers) as response:
            return self._append(response, part, on_bytes)

    def _append(
        self, response: httpx.Response, part: PartFile, on_bytes: OnBytes | None, base: Path | None = None
    ) -> str:
        with self._channel.down.transfer(part.size_bytes - part.offset) as pace:
            tag = str(response.headers.get("etag", "")).strip('"')
            if response.status_code == 416:  # the blob there is shorter than the partial download
                part.truncate()
                return tag
            if response.status_code != 206 or range_start(response) != part.offset:
                part.truncate()
                if response.status_code == 206 and range_start(response) != 0:
                    raise self._channel.foreign(response, b"")
            if base is not None and response.headers.get("content-type") == CHANGE_TYPE:
                part.append_change(base, self._counted(response, pace))
                return tag
            # Not iter_raw(CHUNK_BYTES): it would hold back an incomplete chunk, and lose it when the connection is cut.
            for chunk in self._counted(response, pace):
                if not part.append(chunk):
                    return tag  # longer than the manifest says: the hash check fails, and the disk does not fill
                if on_bytes:
                    on_bytes(len(chunk))
            return tag

    def _counted(self, response: httpx.Response, pace: Transfer) -> Iterator[bytes]:
        """The chunks of a body, counted as downloaded."""
        for chunk in response.iter_raw():
            self._channel.count(down=len(chunk))
            pace.moved(len(chunk))
            yield chunk

    # --- probes ---------------------------------------------------------------------------------------------------

    def probe_up(self, size_bytes: int) -> tuple[probe.Mark, ...]:
        """Send random bytes that the server discards; return when they arrived, by its clock.

        Up to `probe.MAX_PROBE_BYTES`; fewer arrive on a slow line. Raises NotFound if the server has no such route, and
        NetworkError with ``received_status`` 429 if it has measured enough for now.
        """
        blocks = probe.random_blocks(size_bytes, lambda count: self._channel.count(up=count))
        headers = {"content-length": str(size_bytes), "content-type": "application/octet-stream"}
        with self._channel.exchange("POST", routes.PROBE, content=blocks, headers=headers) as response:
            return decode_marks(self._channel.decode(response, dict[str, object]), size_bytes)

    def probe_down(self, size_bytes: int) -> tuple[probe.Mark, ...]:
        """Download random bytes; return when they arrived. Limits and errors as in `probe_up`."""
        recorder = probe.MarkRecorder(size_bytes)
        with self._channel.exchange("GET", routes.PROBE, params={"bytes": size_bytes}, headers={}) as response:
            if response.headers.get("content-type") != "application/octet-stream":
                raise self._channel.foreign(response, b"")
            for chunk in response.iter_raw():
                self._channel.count(down=len(chunk))
                recorder.arrived(len(chunk))
                if recorder.size_bytes > size_bytes:
                    raise ProtocolError(f"{self.base_url} sends more than the requested {size_bytes} bytes")
        return recorder.marks()

    def _own(self, template: str, server_round: int = 0, attempt: int = 0) -> str:
        return routes.path_for(template, client_id=self.client_id, server_round=server_round, attempt=attempt)
