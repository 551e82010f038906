"""Tasks and their tensors as Flower records, in both directions. The only file that knows how they are packed.

    "config"   ConfigRecord: "server-round" and the JSON of a task, an introduction or a reply
    "arrays"   down: one Array per blob, named by its SHA-256; up: one per tensor of the update, named UNIT|TENSOR
    "metrics"  MetricRecord: what the device measured, with "num-examples"

An Array holds raw bytes in an ``stype`` of edgefed's, since numpy has no bfloat16: mods that average or clip arrays do
not apply to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgefed.agent.cache import BlobCache, OnBytes, PartFile, check_sha256
from edgefed.disk import disk_errors, sync_file
from edgefed.errors import ChecksumMismatch, ConfigError, MalformedMessage, NotFound
from edgefed.flower.tasks import RoundReply
from edgefed.protocol import frames
from edgefed.protocol.messages import Message, T, TensorInfo, decode_message, encode_message
from edgefed.protocol.slices import UnitSlice

BLOB_STYPE, TENSOR_STYPE = "edgefed.blob", "edgefed.tensor"
_BODY, _ROUND = "edgefed", "server-round"


def flower() -> Any:
    """The module ``flwr.app``. Raises ConfigError where the package is missing or too old."""
    try:
        from flwr import app
    except ImportError as error:
        raise ConfigError(
            f"a federation on Flower needs the package flwr: {error}", remedy="Run `pip install 'edgefed[flower]'`."
        ) from error
    return app


def pack(message: Message, server_round: int = 0, blobs: Mapping[str, Path] | None = None) -> Any:
    """A RecordDict with ``message`` and the files of ``blobs``, {sha256: path}."""
    app, arrays = flower(), {}
    for sha256, path in (blobs or {}).items():
        with disk_errors(path):
            data = path.read_bytes()
        arrays[sha256] = app.Array(dtype="uint8", shape=(len(data),), stype=BLOB_STYPE, data=data)
    return app.RecordDict(
        {
            "arrays": app.ArrayRecord(arrays),
            "config": app.ConfigRecord({_ROUND: server_round, _BODY: encode_message(message)}),
        }
    )


def unpack(content: Any, kind: type[T]) -> T:
    """The message in a RecordDict. Raises MalformedMessage."""
    body = dict(content.config_records.get("config", {})).get(_BODY)
    if not isinstance(body, bytes):
        raise MalformedMessage("the message has no config record of edgefed; both sides need ExpertStrategy's app")
    return decode_message(body, kind)


def store_blobs(content: Any, cache: BlobCache) -> None:
    """Put the blobs of a RecordDict into the cache. Raises ChecksumMismatch, MalformedMessage, StorageError."""
    for sha256, array in content.array_records.get("arrays", {}).items():
        check_sha256(sha256, len(array.data))
        part = PartFile(cache.path(sha256), len(array.data))
        with part.opened():
            part.truncate()
            part.append(array.data)
        if part.sha256() != sha256:
            part.discard()
            raise ChecksumMismatch(f"the message has other content than blob {sha256[:12]}")
        part.publish()


def pack_reply(reply: RoundReply, server_round: int) -> Any:
    """A RecordDict with ``reply`` and the tensors of its update, if it has one."""
    content, app = pack(reply, server_round), flower()
    if reply.meta is not None:
        path, arrays = Path(reply.update), {}
        for name, entry in frames.read_header(path).items():
            data = frames.array_bytes(frames.map_tensor(path, entry)).tobytes() if entry.size_bytes else b""
            arrays[name] = app.Array(dtype=entry.info.dtype, shape=entry.info.shape, stype=TENSOR_STYPE, data=data)
        content["arrays"] = app.ArrayRecord(arrays)
        content["metrics"] = app.MetricRecord({**reply.meta.metrics, "num-examples": reply.meta.num_examples})
    return content


def store_update(content: Any, path: Path) -> str:
    """Write the tensors of a reply to ``path`` as a frame, in their order; returns its SHA-256.

    Sizes are checked by whoever reads the frame. Raises MalformedMessage for another dtype, StorageError.
    """
    arrays = content.array_records.get("arrays", {})
    for name, array in arrays.items():
        if array.stype != TENSOR_STYPE or array.dtype not in frames.ITEM_BYTES:
            raise MalformedMessage(f"array {name[:80]!r} is {array.dtype[:20]!r} in {array.stype[:40]!r}")
    infos = [TensorInfo(name=name, dtype=array.dtype, shape=tuple(array.shape)) for name, array in arrays.items()]
    digest = hashlib.sha256()
    with disk_errors(path), path.open("wb") as file:
        for chunk in (frames.encode_header(infos), *(array.data for array in arrays.values())):
            digest.update(chunk)
            file.write(chunk)
        sync_file(file)
    return digest.hexdigest()


class NoSource:
    """Blobs come with Flower's messages only."""

    def download(
        self, sha256: str, size_bytes: int, path: Path, on_bytes: OnBytes | None = None, base: Path | None = None
    ) -> None:
        """Refuse."""
        raise NotFound(f"blob {sha256[:12]} is not on this device")

    def download_slice(self, item: UnitSlice, path: Path, on_bytes: OnBytes | None = None) -> None:
        """Refuse."""
        self.download(item.sha256, item.size_bytes, path, on_bytes)
