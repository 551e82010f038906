"""Blobs of a server for a moment, without the state folder of a device."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgefed.agent.addresses import check_base_url
from edgefed.agent.backoff import Retry
from edgefed.agent.cache import BlobCache, Item
from edgefed.agent.transport import AggregatorClient
from edgefed.progress import ProgressSink

_CONNECT_LIMIT_S = 20.0


class TemporaryCache:
    """A `BlobCache` of a server's blobs in a temporary folder, which is deleted at the end."""

    def __init__(self, url: str, token: str | None, sink: ProgressSink) -> None:
        check_base_url(url)
        self._sink = sink
        self.client = AggregatorClient(url, token=token)
        self._folder = tempfile.TemporaryDirectory(prefix="edgefed-download-")

    def __enter__(self) -> TemporaryCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._folder.cleanup()

    def fetch(self, items: Iterable[Item], present: Mapping[str, Path]) -> dict[str, Path]:
        """{sha256: file} of all items; those in ``present`` are not downloaded. A lost connection is tried again."""
        absent = [item for item in items if item.sha256 not in present]
        cache = BlobCache(Path(self._folder.name), self.client)
        self._sink.phase("download", cache.bytes_to_download(absent), "B")
        retry = Retry(threading.Event())
        found = retry.run(lambda: cache.ensure(absent, self._sink.advance), give_up_after_s=_CONNECT_LIMIT_S)
        self._sink.done()
        return {**present, **found}
