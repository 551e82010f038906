"""The global model as it can be downloaded now: the manifest of the open round, and which blobs a client may fetch."""

from __future__ import annotations

from pathlib import Path

from edgefed.aggregator.blobs import BlobStore, is_sha256
from edgefed.aggregator.store import Store
from edgefed.aggregator.validate import max_update_bytes
from edgefed.errors import NotFound, StateCorrupt
from edgefed.protocol.messages import Manifest, encode_message


class Catalog:
    """Reads from the store once a round and from memory otherwise. Its owner changes it under its own lock."""

    manifest: Manifest
    """Of the open round; after the last one, the final model."""
    limit_bytes: int
    """Most bytes of an update to this model."""

    def __init__(self, store: Store, blobs: BlobStore):
        self._store, self._blobs = store, blobs
        self.load(store.current_round().server_round)

    def load(self, server_round: int) -> None:
        """Turn to a round. Raises StateCorrupt when the store does not have its manifest."""
        manifest = self._store.manifest(server_round)
        if manifest is None or not manifest.units:
            raise StateCorrupt(f"the manifest of round {server_round} is missing")
        self.manifest, self._encoded = manifest, encode_message(manifest)
        self.limit_bytes = max_update_bytes(manifest.units)
        self.load_references()

    def load_references(self) -> None:
        """Read again which blobs the kept manifests name."""
        self._referenced = self._store.referenced()

    def check_files(self) -> None:
        """Raise StateCorrupt unless every blob is there with its size, and delete those that nothing names."""
        for sha256, size_bytes in self._referenced.items():
            path = self._blobs.path(sha256)
            if not path.is_file() or path.stat().st_size != size_bytes:
                raise StateCorrupt(f"blob {path} is missing or has another size than was recorded")
        self._blobs.delete_unreferenced(self._referenced)

    def encoded_manifest(self, server_round: int) -> bytes:
        """A round's manifest as it is sent. Raises NotFound when it is not kept."""
        if server_round == self.manifest.server_round:
            return self._encoded
        manifest = self._store.manifest(server_round)
        if manifest is None:
            raise NotFound(f"the manifest of round {server_round} is not kept here")
        return encode_message(manifest)

    def blob(self, sha256: str) -> tuple[Path, int]:
        """Path and size of a blob that a kept manifest names. Raises NotFound for any other name."""
        size_bytes = self._referenced.get(sha256) if is_sha256(sha256) else None
        if size_bytes is None:
            raise NotFound(f"no kept manifest names a blob {sha256[:64]!r}")
        return self._blobs.path(sha256), size_bytes
