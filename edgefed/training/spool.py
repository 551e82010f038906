"""Records from Python, written to a file of JSON Lines once: from then on they are data like any other file.

    spool_records(dataset, state / SPOOL_FILE, max_records=10_000)
    corpus = load_corpus(str(state / SPOOL_FILE), held_out_share=0.1, seed=0)

The records come from a `datasets.Dataset`, a streaming `datasets.IterableDataset`, a generator, or any other iterable
of mappings. One record at a time is in memory. Imports neither `datasets` nor torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edgefed.disk import disk_errors, sync_file, sync_folder
from edgefed.errors import ConfigError, DataError, first_line
from edgefed.hardware.memory import format_bytes, parse_bytes
from edgefed.progress import NullProgress, ProgressSink, counted
from edgefed.training.data import parse_records
from edgefed.training.record_files import json_lines
from edgefed.training.records import AUTOMATIC, RecordFields

SPOOL_FILE = "spooled-data.jsonl"
"""Name of the file in the state folder of a device."""
UNLIMITED_BYTES = 1 << 30
"""Largest file without `max_records` and `max_bytes`. More is an error, because a stream may be endless."""
PROGRESS_BYTES = 1 << 20
"""Bytes between two reports of progress."""

RecordSource = Iterable[Mapping[str, Any]]


def check_limits(data: object, max_records: int | None, max_bytes: str | int | None) -> None:
    """Raise ConfigError unless ``data`` is a path or an iterable of records, and the limits are valid for it."""
    if isinstance(data, (str, Path)):
        if max_records is not None or max_bytes is not None:
            raise ConfigError(
                "`max_records` and `max_bytes` have no effect with a path: they limit data sets passed as objects",
                remedy="Remove them.",
            )
        return
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, list(data)[:5]))
        raise ConfigError(
            f"`data` is a {type(data).__name__} with the keys {splits}, not an iterable of records",
            remedy="Pass one of its splits, such as data['train'], or a list of records.",
        )
    if isinstance(data, (bytes, bytearray)) or not hasattr(data, "__iter__"):
        call = " Call the function: pass what it returns." if callable(data) else ""
        raise ConfigError(
            f"`data` must be a path or an iterable of records, found {type(data).__name__}",
            remedy=f"Pass a file, a `datasets` data set, or an iterable of dicts.{call}",
        )
    if max_records is not None and max_records < 1:
        raise ConfigError(f"invalid `max_records`: {max_records}; expected at least 1")
    try:
        parse_bytes(str(max_bytes or "1GiB"))
    except ConfigError as error:
        raise ConfigError(f"`max_bytes`: {error}", remedy=error.remedy) from None


def spool_records(
    records: RecordSource,
    path: Path,
    fields: RecordFields = AUTOMATIC,
    max_records: int | None = None,
    max_bytes: str | int | None = None,
    progress: ProgressSink | None = None,
) -> None:
    """Write ``records`` to ``path``, one line each, readable by the owner only.

    ``progress`` gets a phase "read" in bytes, and a message on what was read.

    Only the fields that are used are written (`RecordFields.columns`). Reading stops after ``max_records``, without
    asking for another one, or before the record that would make the file larger than ``max_bytes``. ``path`` is
    replaced once the file is complete; it stays as it was after an error.

    Raises:
        DataError: the iteration raised, which names the record; no record or none that can be used; a record cannot be
            written as JSON; more than `UNLIMITED_BYTES` without a limit.
        StorageError, DiskFull: the file cannot be written.

    """
    sink = progress or NullProgress()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with disk_errors(path):  # what the iteration raises is a DataError before it gets here
            temporary.unlink(missing_ok=True)  # a leftover might have another mode
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                spool = _Spool(records, fields, file, max_records, max_bytes, sink)
                parsed = ((place._replace(unit="record"), content) for place, content in json_lines(spool.lines()))
                for _ in parse_records(parsed, spool.label, fields, []):
                    pass
                sync_file(file)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        sink.done()
        temporary.unlink(missing_ok=True)
    sink.message(spool.note(path))


class _Spool:
    """The lines of an iterable of records, each written to ``file`` as it is read."""

    def __init__(
        self, records: RecordSource, fields: RecordFields, file: BinaryIO, max_records: int | None,
        max_bytes: str | int | None, progress: ProgressSink,
    ):  # fmt: skip
        self.label = f"data ({type(records).__name__})"
        self._records, self._fields, self._file = records, fields, file
        self._max_records, self._progress = max_records, progress
        self._max_bytes = None if max_bytes is None else parse_bytes(str(max_bytes))
        self._count, self._bytes, self._limit = 0, 0, ""

    def note(self, path: Path) -> str:
        """What was read, for the user."""
        first = "the first " if self._limit else ""
        limit = f" (`{self._limit}`)" if self._limit else ""
        count = f"{first}{counted(self._count, 'record')}{limit}"
        return f"{self.label}: {count} written to {path}, {format_bytes(self._bytes)}"

    def lines(self) -> Iterator[str]:
        """Yield the line of each record, as JSON without a line feed."""
        self._progress.phase("read", self._max_bytes, "B")
        shown = 0
        for record in self._read():
            if not self._count and not isinstance(record, Mapping):
                raise DataError(
                    f"{self.label}: record 1 must be a dict, found {type(record).__name__}",
                    remedy="Pass records such as {'text': '...'}; of a pandas table, table.to_dict('records').",
                )
            line = self._encode(record)
            size = self._bytes + len(line)
            if self._max_bytes is not None and size > self._max_bytes:
                self._limit = f"max_bytes={format_bytes(self._max_bytes)}"
                if not self._count:
                    raise DataError(
                        f"{self.label}: record 1 has {format_bytes(len(line))}, more than `{self._limit}`",
                        remedy="Raise `max_bytes`.",
                    )
                return
            if self._max_bytes is None and self._max_records is None and size > UNLIMITED_BYTES:
                raise DataError(
                    f"{self.label} has more than {format_bytes(UNLIMITED_BYTES)} in its first "
                    f"{counted(self._count + 1, 'record')}; it may be endless",
                    remedy="Set `max_records` or `max_bytes`: the first part is read, as much as they allow.",
                )
            self._file.write(line)
            self._count, self._bytes = self._count + 1, size
            if size - shown >= PROGRESS_BYTES:
                self._progress.advance(size - shown)
                shown = size
            yield line.decode()

    def _read(self) -> Iterator[Any]:
        """Yield the records until the end or `max_records`."""
        try:
            # Of a `datasets` data set, columns such as images are then not decoded.
            names = getattr(self._records, "column_names", None)
            select = getattr(self._records, "select_columns", None)
            chosen = select(self._fields.columns(names)) if select is not None and isinstance(names, list) else None
            records = iter(self._records if chosen is None else chosen)
            while self._max_records is None or self._count < self._max_records:
                try:
                    record = next(records)
                except StopIteration:
                    return
                yield record
        except Exception as error:  # whatever the user's code, the network or the files behind it raise
            before = f", or set `max_records={self._count}` to use those before" if self._count else ""
            raise DataError(
                f"{self.label} failed at record {self._count + 1}: {type(error).__name__}: {first_line(error)}",
                remedy=f"Correct the data set{before}.",
            ) from error
        self._limit = f"max_records={self._max_records}"

    def _encode(self, record: Any) -> bytes:
        """The line of a record. What is not a mapping is written too, and reported when it is parsed."""
        if isinstance(record, Mapping):
            names = self._fields.columns([name for name in record if isinstance(name, str)])
            record = {name: record[name] for name in names}
        try:
            try:
                return (json.dumps(record, ensure_ascii=False, default=_plain) + "\n").encode()
            except UnicodeEncodeError:  # half a surrogate pair, which is reported when it is parsed
                return (json.dumps(record, default=_plain) + "\n").encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self.label}: record {self._count + 1} cannot be written as JSON: {first_line(error)}",
                remedy="Use texts, numbers, lists and dicts with text keys.",
            ) from error


def _plain(value: Any) -> Any:
    """A value that JSON does not know: a mapping, an array as a list, others as an object, which is no text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else {"type": type(value).__name__}
