"""Slices of experts on the wire: some rows of a neuron table, as ranges of the bytes of the whole unit's blob.

In a run whose devices hold slices, an expert unit has a table with a row per neuron (`messages.NEURON_TABLE`). A device
downloads the rows that it holds, and uploads rows with a `messages.NEURON_INDEX` that names them: int32 (W,),
ascending.

    GET {BLOB}?rows=BITS      a frame with the table's rows, the unit's other tensors, and the index

BITS is base64 (URL-safe) of a bit per row. The content of such an answer depends on blob and rows alone, so a transfer
resumes as any other; its SHA-256 is the answer's ETag.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edgefed.disk import disk_errors
from edgefed.errors import MalformedMessage
from edgefed.protocol.frames import encode_header, read_header, storage_dtype, tensor_size_bytes
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, Message, TensorInfo, UnitInfo

INDEX_DTYPE = "I32"


class UnitSlice(Message, frozen=True):
    """Some neurons of a unit, as a device downloads and keeps them: ``rows`` is `encode_rows` of them.

    It has a name of the form of a hash, by which a cache knows it, and a size, like `UnitInfo`.
    """

    unit: UnitInfo
    rows: str

    @property
    def key(self) -> str:
        """Key of the unit."""
        return self.unit.key

    @property
    def sha256(self) -> str:
        """Name of the slice: a hash of the blob's hash and the rows, not of the content."""
        return hashlib.sha256(f"{self.unit.sha256}:{self.rows}".encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of the slice's frame."""
        table = neuron_table(self.unit)
        assert table is not None, "the unit has a table"
        infos = slice_tensors(self.unit.tensors, len(decode_rows(self.rows, table.shape[0])))
        return len(encode_header(infos)) + sum(map(tensor_size_bytes, infos))


def slice_unit(unit: UnitInfo, rows: Sequence[int] | np.ndarray) -> UnitSlice:
    """The slice of ``unit`` with these neurons."""
    table = neuron_table(unit)
    assert table is not None, "the unit has a table"
    return UnitSlice(unit=unit, rows=encode_rows(rows, table.shape[0]))


def neuron_table(unit: UnitInfo) -> TensorInfo | None:
    """The neuron table of a unit, (I, C); None if the unit has none."""
    return next((info for info in unit.tensors if info.name == NEURON_TABLE), None)


def slice_tensors(tensors: Iterable[TensorInfo], width: int) -> tuple[TensorInfo, ...]:
    """The tensors of a slice of ``width`` neurons, in the order of its frame: those of the unit, then the index."""
    index = TensorInfo(name=NEURON_INDEX, dtype=INDEX_DTYPE, shape=(width,))
    return (
        *(
            TensorInfo(name=info.name, dtype=info.dtype, shape=(width, *info.shape[1:]))
            if info.name == NEURON_TABLE
            else info
            for info in tensors
        ),
        index,
    )


def encode_rows(rows: Sequence[int] | np.ndarray, num_rows: int) -> str:
    """A set of rows of a table of ``num_rows`` as text for a URL."""
    mask = np.zeros(num_rows, dtype=np.bool_)
    mask[np.asarray(rows, dtype=np.int64)] = True
    return base64.urlsafe_b64encode(np.packbits(mask).tobytes()).decode()


def decode_rows(text: str, num_rows: int) -> np.ndarray:
    """Inverse of `encode_rows`: (W,) int32, ascending. Raises MalformedMessage unless these are rows of the table."""
    try:
        bits = np.frombuffer(base64.b64decode(text.encode(), altchars=b"-_", validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessage(f"the rows {text[:40]!r} are not base64") from error
    rows = np.flatnonzero(np.unpackbits(bits)).astype(np.int32)
    if len(bits) != -(-num_rows // 8) or not are_rows(rows, num_rows):
        raise MalformedMessage(f"the rows {text[:40]!r} are not those of a table of {num_rows} neurons")
    return rows


def are_rows(rows: np.ndarray, num_rows: int) -> bool:
    """Whether ``rows`` are one or more rows of a table of ``num_rows``, ascending, none twice."""
    return bool(len(rows) and rows[0] >= 0 and rows[-1] < num_rows and (np.diff(rows.astype(np.int64)) > 0).all())


class SliceFile:
    """The frame of a slice as a file to read, from the file of the whole unit: nothing is copied before it is read.

    ``rows`` is the text of `encode_rows`. Raises MalformedMessage if the unit has no neurons or not these.
    """

    def __init__(self, path: Path, rows: str):
        self.name = f"{path} (slice)"
        entries = sorted(read_header(path).values(), key=lambda entry: entry.start)
        table = next((entry for entry in entries if entry.info.name == NEURON_TABLE), None)
        if table is None:
            raise MalformedMessage(f"blob {path.name[:12]} has no neurons: it is downloaded as a whole")
        found = decode_rows(rows, table.info.shape[0])
        header = encode_header(slice_tensors([entry.info for entry in entries], len(found)))
        index = found.astype(storage_dtype(INDEX_DTYPE)).tobytes()
        row_bytes = table.size_bytes // table.info.shape[0]
        self._parts: list[tuple[int, int | bytes, int]] = []  # (begin in the slice, begin in the file or bytes, length)
        self.size_bytes = 0
        self._add(header, len(header))
        for entry in entries:
            if entry is not table:
                self._add(entry.start, entry.size_bytes)
                continue
            for run in np.split(found, np.flatnonzero(np.diff(found) != 1) + 1):
                self._add(entry.start + int(run[0]) * row_bytes, len(run) * row_bytes)
        self._add(index, len(index))
        self._begins = np.array([begin for begin, _, _ in self._parts])
        self._at = 0
        self._file = io.FileIO(path)

    def _add(self, source: int | bytes, length: int) -> None:
        if length:
            self._parts.append((self.size_bytes, source, length))
            self.size_bytes += length

    def seek(self, offset: int) -> None:
        """Continue to read at a byte of the slice."""
        self._at = offset

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes; b"" at the end."""
        pieces: list[bytes] = []
        left = min(count, self.size_bytes - self._at)
        number = int(np.searchsorted(self._begins, self._at, side="right")) - 1
        with disk_errors(f"read {self.name}"):
            while left > 0:
                begin, source, length = self._parts[number]
                inside = self._at - begin
                size = min(left, length - inside)
                if isinstance(source, bytes):
                    piece = source[inside : inside + size]
                else:
                    self._file.seek(source + inside)
                    piece = self._file.read(size)
                if not piece:
                    raise OSError("the file ends too early")
                pieces.append(piece)
                self._at += len(piece)
                left -= len(piece)
                number += self._at == begin + length
        return b"".join(pieces)

    def sha256(self) -> str:
        """Hash of the slice's frame. Reads it once, and seeks back to the first byte."""
        digest = hashlib.sha256()
        self.seek(0)
        while chunk := self.read(1 << 20):
            digest.update(chunk)
        self.seek(0)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SliceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
