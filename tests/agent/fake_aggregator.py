"""A small aggregator in memory, on a real loopback socket, that fails on request.

It keeps the contract of `edgefed.protocol.routes` and averages updates without weights; it validates nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edgefed.errors import (
    ChecksumMismatch,
    EdgefedError,
    InvalidUpdate,
    NotFound,
    OffsetMismatch,
    RoundClosed,
    Unauthorized,
    UnknownClient,
)
from edgefed.protocol import frames, routes
from edgefed.protocol.messages import (
    Assignment,
    FileInfo,
    Finished,
    Heartbeat,
    Leave,
    Manifest,
    Register,
    Registered,
    RunConfig,
    TensorInfo,
    TrainingConfig,
    UnitInfo,
    UpdateAccepted,
    UpdateMeta,
    UploadState,
    Wait,
    decode_message,
    encode_error,
    encode_message,
)

EXPERTS = 4
TENSOR = TensorInfo(name="down_proj", dtype="F32", shape=(64, 64))


class _QuickServer(uvicorn.Server):
    """Uvicorn checks ten times a second whether it should stop, and once more while it stops; tests are in a hurry."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in self.server_state.connections:
            connection.transport.abort()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self.server_state.connections:
            await asyncio.sleep(0)


class FakeAggregator:
    """Every attribute may be read and set by a test while the server runs."""

    def __init__(
        self, folder: Path, *, run_id: str = "run-1", rounds: int = 2, quorum: int = 1, token: str | None = None
    ) -> None:
        self.run = RunConfig(
            run_id=run_id, model="tiny", method="fedavg", method_options={}, rounds=rounds, seed=0,
            training=TrainingConfig(local_steps=3),
        )  # fmt: skip
        self.quorum = quorum
        self.token = token
        self.heartbeat_s = 0.05
        self.server_round = 1
        self.clients: dict[str, Register] = {}
        self.registrations = 0
        self.heartbeats: list[Heartbeat] = []
        self.left: list[str] = []
        self.partial: dict[tuple[str, int, int], bytearray] = {}
        self.accepted: dict[tuple[str, int], UpdateMeta] = {}
        self.commits: list[UpdateMeta] = []
        self.log: list[tuple[str, str, str]] = []
        """(method, path, query) of every request."""
        self.puts: list[tuple[int, int]] = []
        """(offset, bytes taken) of every PUT."""
        self.blob_requests: list[tuple[str, int]] = []
        """(sha256, first byte) of every blob request."""
        self.fail: list[tuple[str, EdgefedError | int, int]] = []
        """(what the path contains, error or bare HTTP status, how often); a bare status comes with an HTML body."""
        self.reasons: list[str] = []
        """Requests for work get these reasons to wait, one each."""
        self.body_limit: int | None = None
        """A PUT of more bytes gets a proxy's bare 413, after its body was swallowed."""
        self.ignore_range = False
        self.corrupt_blobs: dict[str, int] = {}
        """How often a blob is sent with a flipped bit."""
        self.stall_upload_at: int | None = None
        """A PUT keeps this many bytes of an update, then hangs until the attribute is None."""
        self.lose_acknowledgements = 0
        """Commits that count, whose answer is a bare 502."""
        self.reset_on_commit = 0
        """Commits that throw the upload away and answer ChecksumMismatch."""
        self.port = 0
        self._folder = folder
        self.blobs: dict[str, bytes] = {}
        self.units: dict[str, UnitInfo] = {}
        for expert in range(EXPERTS):
            self._store(f"model.layers.0.mlp.experts.{expert}", expert, True, np.full(TENSOR.shape, expert, np.float32))
        self._store("model.embed", -1, False, np.full(TENSOR.shape, -1, np.float32))
        config = b'{"model_type": "toy"}'
        self.files = (FileInfo(name="config.json", sha256=self.add_blob(config), size_bytes=len(config)),)

    # --- life -----------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the old port after a restart."""
        paths = [
            (routes.REGISTER, "POST", self._register), (routes.HEARTBEAT, "POST", self._heartbeat),
            (routes.LEAVE, "POST", self._leave), (routes.ASSIGNMENT, "GET", self._assignment),
            (routes.MANIFEST, "GET", self._manifest), (routes.BLOB, "GET", self._blob),
            (routes.UPLOAD, "GET", self._upload_state), (routes.UPLOAD, "PUT", self._upload),
            (routes.COMMIT, "POST", self._commit),
        ]  # fmt: skip
        app = Starlette(routes=[Route(path, self._guard(handler), methods=[method]) for path, method, handler in paths])
        config = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off", ws="none", access_log=False,
            timeout_graceful_shutdown=0,
        )  # fmt: skip
        self._server = _QuickServer(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < end, "the fake aggregator did not start"
            assert self._thread.is_alive(), "the fake aggregator ended"
            time.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Close all connections and end; `start` listens on the same port again."""
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the fake aggregator did not stop"

    # --- handlers -------------------------------------------------------------------------------------------------

    def _guard(self, handler):
        async def guarded(request: Request) -> Response:
            path = request.url.path
            self.log.append((request.method, path, request.url.query))
            for place, (part, failure, times) in enumerate(self.fail):
                if part in f"{request.method} {path}":
                    self.fail[place] = (part, failure, times - 1)
                    if times == 1:
                        self.fail.pop(place)
                    if isinstance(failure, int):
                        return Response("<html>proxy</html>", failure, media_type="text/html")
                    return _error(failure)
            try:
                if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                    raise Unauthorized("wrong token")
                client_id = request.path_params.get("client_id")
                if client_id is not None:
                    if client_id not in self.clients:
                        raise UnknownClient(f"no client {client_id}")
                    if request.headers.get(routes.CLIENT_KEY_HEADER) != self.clients[client_id].client_key:
                        raise Unauthorized("wrong client key")
                return await handler(request)
            except EdgefedError as error:
                return _error(error)

        return guarded

    async def _register(self, request: Request) -> Response:
        message = decode_message(await request.body(), Register)
        self.clients[message.client_id] = message
        self.registrations += 1
        return _reply(Registered(run=self.run, heartbeat_s=self.heartbeat_s))

    async def _heartbeat(self, request: Request) -> Response:
        self.heartbeats.append(decode_message(await request.body(), Heartbeat))
        return _reply({})

    async def _leave(self, request: Request) -> Response:
        self.left.append(decode_message(await request.body(), Leave).reason)
        return _reply({})

    async def _assignment(self, request: Request) -> Response:
        client_id, end = request.path_params["client_id"], time.monotonic() + float(request.query_params["wait_s"])
        if self.reasons:
            return _reply(Wait(retry_after_s=0.0, reason=self.reasons.pop(0)))
        while True:
            if self.server_round > self.run.rounds:
                return _reply(Finished(server_round=self.server_round, reason="all rounds done"))
            if (client_id, self.server_round) not in self.accepted:
                return _reply(Assignment(server_round=self.server_round, deadline_s=None, seed=self.server_round))
            if time.monotonic() >= end:
                return _reply(Wait(retry_after_s=0.0, reason="the others still train"))
            await asyncio.sleep(0.02)

    async def _manifest(self, request: Request) -> Response:
        if request.path_params["server_round"] not in ("latest", str(self.server_round)):
            raise NotFound("that round is over")
        return _reply(
            Manifest(
                run_id=self.run.run_id, server_round=self.server_round, experts_per_layer=(EXPERTS,),
                units=tuple(self.units.values()), files=self.files,
            )
        )  # fmt: skip

    async def _blob(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        if sha256 not in self.blobs:
            raise NotFound("no such blob")
        data = self.blobs[sha256]
        if self.corrupt_blobs.get(sha256):
            self.corrupt_blobs[sha256] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        span = request.headers.get("range", "")
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span and not self.ignore_range else 0
        self.blob_requests.append((sha256, start))
        if start >= len(data):
            return Response(status_code=416, headers={"content-range": f"bytes */{len(data)}"})
        headers = {"content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return Response(data[start:], 206 if start else 200, headers, media_type="application/octet-stream")

    def _upload_key(self, request: Request) -> tuple[str, int, int]:
        values = request.path_params
        key = values["client_id"], int(values["server_round"]), int(values["attempt"])
        if key[1] != self.server_round and key[:2] not in self.accepted:
            raise RoundClosed(f"round {key[1]} is over")
        return key

    async def _upload_state(self, request: Request) -> Response:
        key = self._upload_key(request)
        status = "accepted" if key[:2] in self.accepted else "partial"
        return _reply(UploadState(offset=len(self.partial.get(key, b"")), status=status))

    async def _upload(self, request: Request) -> Response:
        key, offset = self._upload_key(request), int(request.query_params["offset"])
        if self.body_limit is not None and int(request.headers["content-length"]) > self.body_limit:
            await request.body()
            return Response("<html>413 Request Entity Too Large</html>", 413, media_type="text/html")
        received = self.partial.setdefault(key, bytearray())
        if offset != len(received):
            return _error(OffsetMismatch("not there", offset=len(received)))
        place = len(self.puts)
        self.puts.append((offset, 0))
        try:
            async for chunk in request.stream():
                if self.stall_upload_at is not None:
                    received += chunk[: max(0, self.stall_upload_at - len(received))]
                    self.puts[place] = (offset, len(received) - offset)
                    while self.stall_upload_at is not None and not await request.is_disconnected():
                        await asyncio.sleep(0.02)
                    raise ClientDisconnect
                received += chunk
                self.puts[place] = (offset, len(received) - offset)
        except ClientDisconnect:
            return Response(status_code=400)
        return _reply(UploadState(offset=len(received), status="partial"))

    async def _commit(self, request: Request) -> Response:
        meta = decode_message(await request.body(), UpdateMeta)
        self.commits.append(meta)
        key = self._upload_key(request)
        repeated = key[:2] in self.accepted
        if not repeated:
            data = bytes(self.partial.get(key, b""))
            if self.reset_on_commit or hashlib.sha256(data).hexdigest() != meta.sha256:
                self.reset_on_commit = max(0, self.reset_on_commit - 1)
                self.partial.pop(key, None)
                raise ChecksumMismatch("other bytes arrived than were sent")
            (self._folder / f"{key[1]}-{key[0]}").write_bytes(data)
            self.accepted[key[:2]] = meta
            self._close_round()
        if self.lose_acknowledgements:
            self.lose_acknowledgements -= 1
            return Response("<html>bad gateway</html>", 502, media_type="text/html")
        return _reply(UpdateAccepted(server_round=key[1], repeated=repeated))

    # --- the model ------------------------------------------------------------------------------------------------

    def _close_round(self) -> None:
        updates = sorted(self._folder.glob(f"{self.server_round}-*"))
        if len(updates) < self.quorum:
            return
        for unit in list(self.units.values()):
            name = f"{unit.key}|{TENSOR.name}"
            values = [frames.map_tensor(path, frames.read_header(path)[name]) for path in updates if unit.trainable]
            if values:
                self._store(unit.key, unit.expert, True, np.mean(values, axis=0, dtype=np.float32))
        self.server_round += 1

    def value_of(self, expert: int) -> float:
        """The value that all elements of an expert share in the current global model."""
        path = self._folder / "look"
        path.write_bytes(self.blobs[self.units[f"model.layers.0.mlp.experts.{expert}"].sha256])
        values = np.array(frames.map_tensor(path, frames.read_header(path)[TENSOR.name]))
        assert (values == values.flat[0]).all()
        return float(values.flat[0])

    def _store(self, key: str, expert: int, trainable: bool, values: np.ndarray) -> None:
        path = self._folder / "unit"
        sha256, size = frames.write_frame(path, {TENSOR.name: (TENSOR.dtype, values)})
        self.blobs[sha256] = path.read_bytes()
        self.units[key] = UnitInfo(
            key=key, kind="expert" if expert >= 0 else "dense", layer=0 if expert >= 0 else -1, expert=expert,
            trainable=trainable, sha256=sha256, size_bytes=size, tensors=(TENSOR,),
        )  # fmt: skip

    def add_blob(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256


def _reply(message: object) -> Response:
    return Response(encode_message(message), media_type="application/json")


def _error(error: EdgefedError) -> Response:
    return Response(encode_error(error), error.http_status, media_type="application/json")


REFUSED = InvalidUpdate("a tensor holds NaN")
