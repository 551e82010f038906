"""The blob cache against a real server, and against a source that only counts."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from edgefed.agent.cache import BlobCache
from edgefed.agent.transport import AggregatorClient
from edgefed.errors import ChecksumMismatch, DiskFull, MalformedMessage, NotFound, ServerUnreachable
from edgefed.protocol.messages import FileInfo


class CountingSource:
    """Writes blobs from a dictionary; remembers which were asked for and how many at once."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = blobs
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.gate = threading.Barrier(1)

    def download(self, sha256: str, size_bytes: int, path: Path, on_bytes=None, base=None) -> None:
        self.asked.append(sha256)
        self.gate.wait(10)
        if self.error:
            raise self.error
        path.write_bytes(self.blobs[sha256])
        if on_bytes:
            on_bytes(size_bytes)


def make(*contents: bytes) -> tuple[list[FileInfo], CountingSource]:
    blobs = {hashlib.sha256(data).hexdigest(): data for data in contents}
    items = [FileInfo(name=sha[:4], sha256=sha, size_bytes=len(data)) for sha, data in blobs.items()]
    return items, CountingSource(blobs)


def test_only_missing_blobs_are_downloaded(tmp_path):
    items, source = make(b"one", b"two", b"three")
    cache = BlobCache(tmp_path, source)
    assert cache.bytes_to_download(items) == 11
    moved: list[int] = []
    files = cache.ensure([items[0], items[0]], moved.append)
    assert files[items[0].sha256].read_bytes() == b"one"
    assert moved == [3]
    assert {sha: path.read_bytes() for sha, path in cache.ensure(items).items()} == source.blobs
    assert sorted(source.asked) == sorted(source.blobs)
    assert cache.bytes_to_download(items) == 0
    assert cache.ensure([]) == {}


def test_blob_of_the_wrong_size_is_fetched_again(tmp_path):
    items, source = make(b"content")
    cache = BlobCache(tmp_path, source)
    cache.ensure(items)
    cache.path(items[0].sha256).write_bytes(b"cut")
    assert cache.ensure(items)[items[0].sha256].read_bytes() == b"content"
    assert len(source.asked) == 2


def test_prune_keeps_what_is_needed(tmp_path):
    items, source = make(b"one", b"two")
    cache = BlobCache(tmp_path, source)
    cache.ensure(items)
    (tmp_path / ("a" * 64 + ".part")).write_bytes(b"12345")
    (tmp_path / (items[0].sha256 + ".part")).write_bytes(b"6")
    assert cache.prune({items[0].sha256}) == 3 + 5
    assert {file.name for file in tmp_path.iterdir()} == {items[0].sha256, items[0].sha256 + ".part"}


def test_downloads_overlap(tmp_path):
    items, source = make(*(bytes([n]) for n in range(8)))
    source.gate = threading.Barrier(4)  # passes only when four are under way at once
    BlobCache(tmp_path, source, parallel=4).ensure(items)
    assert len(source.asked) == 8


@pytest.mark.parametrize("error", [ServerUnreachable("gone"), NotFound("no"), ChecksumMismatch("bad"), KeyError("bug")])
def test_the_first_error_stops_the_other_downloads(tmp_path, error):
    items, source = make(*(bytes([n]) for n in range(50)))
    source.error = error
    with pytest.raises(type(error)):
        BlobCache(tmp_path, source, parallel=2).ensure(items)
    assert len(source.asked) <= 4


def test_hostile_lists_are_refused(tmp_path):
    cache = BlobCache(tmp_path, CountingSource({}))
    for sha256, size in (("../escape", 1), ("0" * 64, -1)):
        with pytest.raises(MalformedMessage):
            cache.ensure([FileInfo(name="x", sha256=sha256, size_bytes=size)])
    with pytest.raises(MalformedMessage, match="two sizes"):
        cache.ensure([FileInfo(name="x", sha256="0" * 64, size_bytes=size) for size in (1, 2)])


def test_a_full_disk_is_reported_before_the_first_byte(tmp_path):
    source = CountingSource({})
    item = FileInfo(name="x", sha256="0" * 64, size_bytes=1 << 60)
    with pytest.raises(DiskFull, match="are free"):
        BlobCache(tmp_path, source).ensure([item])
    assert source.asked == []


def test_downloads_over_cut_connections(server, proxy, tmp_path):
    datas = [os.urandom(100_000) for _ in range(12)]
    items = [FileInfo(name="x", sha256=server.add_blob(data), size_bytes=len(data)) for data in datas]
    proxy.cut_down += [50_000, 130_000, 90_000]
    with AggregatorClient(proxy.url, read_s=5) as client:
        cache, failures = BlobCache(tmp_path, client), 0
        for _ in range(10):
            left = cache.bytes_to_download(items)
            try:
                files = cache.ensure(items)
                break
            except ServerUnreachable:
                failures += 1
                assert cache.bytes_to_download(items) <= left  # equal: cut before the first byte of an answer
    assert [files[item.sha256].read_bytes() for item in items] == datas
    assert failures >= 1
    assert proxy.cuts_made == 3
    assert client.bytes_down == 12 * 100_000  # no byte that had arrived was fetched again
