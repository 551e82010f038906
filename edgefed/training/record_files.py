"""Records of a source of data, streamed: text, JSON, CSV and Parquet files, folders of them, and `datasets`.

    for place, content in read_source("notes.jsonl", digest): ...

Only the record at hand is in memory, and a batch of rows of a Parquet file. Nothing here knows the forms of records
(`edgefed.training.records`). Does not import torch.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from edgefed.errors import DataError
from edgefed.training.conversions import how_to_convert, keyed_array
from edgefed.training.records import AUTOMATIC, BadRecord, RecordFields, check_object, cut_passages, json_object

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
PLAIN_SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json", *TABLE_SUFFIXES)
COLUMN_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*PLAIN_SUFFIXES, *COLUMN_SUFFIXES)
"""Suffixes of files that can be read. All but `COLUMN_SUFFIXES` may be followed by .gz."""

SEPARATORS = {".tsv": "\t"}
_CHUNK_BYTES = 1 << 16
_JSON_SPACE = " \t\r\n\ufeff"
_MAX_FIELD_CHARACTERS = 1 << 27
"""Longest field of a CSV file. Python's own limit of 131,072 is less than a long article."""


class Place(NamedTuple):
    """Where a record is: the number of its line, row, record or passage, from 1, and the file in a folder."""

    number: int
    unit: str = "line"
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}".lstrip()


Content = Mapping[str, Any] | str | BadRecord
"""A record, a passage of plain text, or why there is neither."""

Records = Iterator[tuple[Place, Content]]


def read_source(source: str, digest: Any, fields: RecordFields = AUTOMATIC) -> Records:
    """Yield each record of ``source`` with its place, and update ``digest``, a hash object, with what is read.

    ``source``: the path of a file with one of `SUFFIXES`, of a folder of such files, or of a folder that
    ``datasets.save_to_disk`` wrote, or the id of a data set of the Hugging Face hub, "owner/name" or
    "owner/name:split". ``fields``: of tables, only the columns that are used are read.

    Raises:
        DataError: not found, an unknown suffix, not UTF-8, damaged, or a package is missing.

    """
    check_source(source)
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        if is_saved_dataset(path):
            from edgefed.training.arrow_data import saved_rows

            return saved_rows(path, digest, fields)
        return _read_folder(path, digest, fields)
    if path.exists():
        return _read_file(path, digest, fields)
    from edgefed.training.arrow_data import hub_rows

    return hub_rows(source, digest, fields)


def check_source(source: str) -> None:
    """Raise DataError unless `read_source` knows the format of ``source``. Reads no content."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        if not is_saved_dataset(path) and not files_of(path):
            other = next((file for file in sorted(path.rglob("*")) if file.is_file()), None)
            raise DataError(
                f"the folder {source} has no file that can be read; known suffixes are {', '.join(SUFFIXES)}",
                remedy="Put a file of text into it." if other is None else how_to_convert(other),
            )
        return
    if path.exists():
        if suffix_of(path) is None:
            raise DataError(
                f"{source} has an unknown suffix; known suffixes are {', '.join(SUFFIXES)}, and .gz behind them",
                remedy=how_to_convert(path),
            )
        return
    if not is_hub_id(source):
        raise DataError(f"file not found: {source}", remedy="Check the path; it is relative to the current folder.")


def is_hub_id(source: str) -> bool:
    """Whether ``source``, which is not a file, has the form of a hub id: owner/name or owner/name:split."""
    owner, slash, name = source.partition("/")
    words = (owner, *name.split(":")) if slash else ()
    plain = all(word and word[0].isalnum() and word.replace("-", "").replace("_", "").replace(".", "").isalnum()
                for word in words)  # fmt: skip
    return len(words) in (2, 3) and plain and suffix_of(pathlib.Path(source)) is None


def suffix_of(path: pathlib.Path) -> str | None:
    """The one of `SUFFIXES` that the file has, in lower case, without .gz; None for another."""
    name = path.name.lower()
    found = next((suffix for suffix in PLAIN_SUFFIXES if name.endswith((suffix, f"{suffix}.gz"))), None)
    return found or next((suffix for suffix in COLUMN_SUFFIXES if name.endswith(suffix)), None)


def is_saved_dataset(folder: pathlib.Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder and its subfolders that can be read, in the order of their names; hidden ones are not."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and suffix_of(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_folder(folder: pathlib.Path, digest: Any, fields: RecordFields) -> Records:
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        digest.update(f"\0{name}\0".encode())
        for place, content in _read_file(path, digest, fields):
            yield place._replace(file=name), content


def _read_file(path: pathlib.Path, digest: Any, fields: RecordFields) -> Records:
    suffix = suffix_of(path)
    if suffix in COLUMN_SUFFIXES:
        from edgefed.training.arrow_data import column_rows

        return column_rows(path, digest, fields)
    if suffix in TEXT_SUFFIXES:
        passages = cut_passages(read_lines(path, digest))
        return ((Place(number, "passage"), passage) for number, passage in enumerate(passages, start=1))
    if suffix in TABLE_SUFFIXES:
        rows = csv_records(path, read_lines(path, digest), separator=SEPARATORS.get(suffix or "", ","))
        return ((Place(number), row) for number, row in rows)
    if suffix == ".json" and _is_array(path):
        return _array_items(path, digest)
    return json_lines(read_lines(path, digest))


def json_lines(lines: Iterator[str]) -> Records:
    """Yield the object of each line, or why it has none."""
    for number, line in enumerate(lines, start=1):
        try:
            yield Place(number), json_object(line)
        except BadRecord as error:
            yield Place(number), error


def csv_records(
    path: pathlib.Path,
    lines: Iterator[str],
    *,
    separator: str = ",",
    on_header: Callable[[list[str]], list[str]] = lambda header: header,
) -> Iterator[tuple[int, dict[str, str] | BadRecord]]:
    """Yield rows as {column: cell} with the number of their first line; a quoted cell may span several lines.

    ``on_header``: given the names of the columns, without spaces around them, returns the names to use.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(lines, strict=True, delimiter=separator)
    start = 1
    try:
        header = on_header([name.strip() for name in next(reader, [])])
        start = reader.line_num + 1
        for cells in reader:
            if not cells:
                yield start, BadRecord("empty line")
            elif len(cells) != len(header):
                yield start, BadRecord(f"{len(cells)} columns, but the first line names {len(header)}")
            else:
                yield start, dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"invalid CSV in {path}, in the row that starts at line {start}: {error}",
            remedy="Double the quotes inside a quoted text, or save the file as .jsonl.",
        ) from error


def _is_array(path: pathlib.Path) -> bool:
    """Whether a .json file is an array. Raises DataError for an object over several lines: it is not a record."""
    start = next(_chunks(path, _NoDigest()), "").lstrip(_JSON_SPACE)
    if re.match(r"\{[ \t]*\r?\n", start):
        raise DataError(
            f"{path} is one JSON object; it must be an array of records, or have one record per line",
            remedy=how_to_convert(path, key=keyed_array(path)),
        )
    return start.startswith("[")


class _JsonText:
    """Text that grows piece by piece while values are decoded from its front."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._text, self._position = pieces, "", 0
        self._decoder = json.JSONDecoder()

    def grow(self) -> bool:
        """Read on; False at the end. The text doubles, so a record of many pieces is decoded in linear time."""
        rest = self._text[self._position :]
        added: list[str] = []
        while not added or sum(map(len, added)) < len(rest):
            piece = next(self._pieces, None)
            if piece is None:
                break
            added.append(piece)
        self._text, self._position = rest + "".join(added), 0
        return bool(added)

    def next_character(self, skipped: str) -> str:
        """The next character that is not in ``skipped``; "" at the end."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in skipped:
                    return self._text[self._position]
                self._position += 1
            if not self.grow():
                return ""

    def skip(self) -> None:
        """Step over one character."""
        self._position += 1

    def value(self) -> Any:
        """The next value. Raises ValueError or RecursionError when there is none."""
        while True:
            try:
                value, self._position = self._decoder.raw_decode(self._text, self._position)
                return value
            except ValueError:
                if not self.grow():
                    raise


def _array_items(path: pathlib.Path, digest: Any) -> Records:
    """Yield the records of a JSON array; one record and some text behind it are in memory."""
    text = _JsonText(_chunks(path, digest))
    text.next_character(_JSON_SPACE)
    text.skip()  # the bracket
    number = 0
    while (character := text.next_character(_JSON_SPACE + ",")) != "]":
        number += 1
        try:
            if not character:
                raise ValueError("the closing bracket is missing")
            value = text.value()
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{path} is not a valid JSON array: {reason} in record {number}",
                remedy=f"Find the place with `python -m json.tool {path}`.",
            ) from error
        try:
            yield Place(number, "record"), check_object(value)
        except BadRecord as problem:
            yield Place(number, "record"), problem
    while text.grow():  # the digest is over the whole file
        text.next_character(_JSON_SPACE + "]")


def _chunks(path: pathlib.Path, digest: Any) -> Iterator[str]:
    """Yield the text of a file in pieces. Raises DataError as `read_lines` does."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with _opened(path) as file:
            while raw := file.read(_CHUNK_BYTES):
                digest.update(raw)
                yield decoder.decode(raw)
                offset += len(raw)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{error.object[error.start]:02x}",
            remedy=_recode(error.object),
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, f"byte {offset}", error) from error


class _NoDigest:
    def update(self, data: bytes) -> None:
        """Ignore the data."""


def _opened(path: pathlib.Path) -> Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def read_lines(path: pathlib.Path, digest: Any) -> Iterator[str]:
    """Yield the lines of `path` as text, unzipped if gzipped, with line feeds; `digest` sees the unzipped bytes.

    Raises:
        DataError: unreadable, damaged gzip, or not UTF-8.

    """
    number = 0
    first = b""
    try:
        with _opened(path) as file:
            for number, raw in enumerate(file, start=1):
                digest.update(raw)
                first = first or raw
                if number == 1 and b"\0" in raw:  # ASCII in UTF-16 is valid UTF-8, too
                    raise DataError(f"{path} is not UTF-8: line 1 contains NUL bytes", remedy=_recode(raw))
                line = raw.decode("utf-8")
                if line.endswith("\r\n"):
                    line = line[:-2] + "\n"
                yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: line {number}, byte {error.start} is 0x{error.object[error.start]:02x}",
            remedy=_recode(first),
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, f"line {number}", error) from error


def _unreadable(path: pathlib.Path, where: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read {path} after {where}: {error}", remedy="Check the permissions, or write the file again."
    )


def _recode(first_bytes: bytes) -> str:
    """Return the remedy for a file in another encoding, judged by its first bytes."""
    if first_bytes.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "UTF-32"
    elif first_bytes.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif b"\0" in first_bytes:
        encoding = "UTF-16LE" if first_bytes[1:2] == b"\0" else "UTF-16BE"
    else:
        encoding = "LATIN1"
    return f"Convert it, for example with `iconv -f {encoding} -t UTF-8`."
