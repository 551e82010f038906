"""Changed blobs on the way down: what differs from a version that the device has, without loss.

A unit that few clients trained, or whose changes came as the largest few of all, differs in few places from the version
of the round before:

    GET {BLOB}?base=SHA256     whole as ever, or of `CHANGE_TYPE` where that is less than half:

        u32 size of the bitmap | bitmap, deflated: a bit for each 2 bytes of the blob | the bytes that differ

The device applies it to the version that it has, and compares the hash of the result as after any download.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgefed.errors import MalformedMessage, NotFound

CHANGE_TYPE = "application/vnd.edgefed.change"
MAX_BLOB_BYTES = 64 * 1024 * 1024
"""Larger blobs are sent whole: a change is made, and applied, in memory."""
_ITEM = 2
_LEVEL = 6


def encode_blob_change(base: Path, blob: Path) -> bytes | None:
    """What makes ``blob`` of ``base``; None if the two are of other sizes, too large, or differ in too much."""
    size_bytes = blob.stat().st_size
    if base.stat().st_size != size_bytes or size_bytes > MAX_BLOB_BYTES or size_bytes % _ITEM:
        return None
    before, after = (np.fromfile(path, dtype="<u2") for path in (base, blob))
    differs = before != after
    if np.count_nonzero(differs) * _ITEM * 2 >= size_bytes:
        return None
    bitmap = zlib.compress(np.packbits(differs, bitorder="little").tobytes(), _LEVEL)
    change = b"".join((len(bitmap).to_bytes(4, "little"), bitmap, after[differs].tobytes()))
    return change if 2 * len(change) < size_bytes else None


def change_between(find: Callable[[str], tuple[Path, int]], base: str, blob: Path) -> bytes | None:
    """`encode_blob_change` of the blob named ``base``; None also where ``find`` does not know it, or a file is gone."""
    try:
        return encode_blob_change(find(base)[0], blob)
    except (NotFound, FileNotFoundError):
        return None


def apply_blob_change(base: Path, change: bytes) -> bytes:
    """The blob that ``change`` makes of ``base``. Raises MalformedMessage; never makes more bytes than ``base`` has."""
    values = np.fromfile(base, dtype="<u2")
    begin = 4 + int.from_bytes(change[:4], "little")
    inflate, wanted = zlib.decompressobj(), -(-len(values) // 8)
    try:
        bitmap = inflate.decompress(change[4:begin], wanted + 1)
    except zlib.error as error:
        raise MalformedMessage(f"the change of a blob cannot be read: {error}") from error
    if len(bitmap) != wanted:
        raise MalformedMessage(f"the bitmap of a change has not the {wanted} bytes that the blob needs")
    differs = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little", count=len(values)).astype(bool)
    if len(change) - begin != _ITEM * np.count_nonzero(differs):
        raise MalformedMessage(
            f"a change of a blob has {len(change) - begin} bytes of values, its bitmap names "
            f"{_ITEM * np.count_nonzero(differs)}"
        )
    values[differs] = np.frombuffer(change, "<u2", offset=begin)
    return values.tobytes()
