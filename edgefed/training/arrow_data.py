"""Rows of Parquet and Arrow files (package `pyarrow`) and of Hugging Face data sets (package `datasets`), in batches.

Both packages are optional: ``pip install 'edgefed[data]'``. A data set of the hub is downloaded to the cache of
`datasets` and read from there, memory-mapped.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgefed.errors import DataError, first_line
from edgefed.hub import endpoint, go_offline, unreachable
from edgefed.training.conversions import how_to_convert, python_command
from edgefed.training.record_files import Place
from edgefed.training.records import RecordFields

if TYPE_CHECKING:
    from edgefed.training.record_files import Records

_BATCH_ROWS = 256
_CHUNK_BYTES = 1 << 20


def column_rows(path: pathlib.Path, digest: Any, fields: RecordFields) -> Records:
    """Yield the rows of a Parquet or Arrow file; ``digest`` sees its bytes. Raises DataError."""
    convert = how_to_convert(path)
    arrow = _package("pyarrow", f"reading {path}", convert)
    name = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        number = 0
        for batch in (_parquet_batches if name == "Parquet" else _arrow_batches)(path, fields):
            for row in batch.to_pylist():
                number += 1
                yield Place(number, "row"), row
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable {name} file: {first_line(error)}", remedy="Write the file again."
        ) from error


def _parquet_batches(path: pathlib.Path, fields: RecordFields) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=fields.columns(file.schema_arrow.names))


def _arrow_batches(path: pathlib.Path, fields: RecordFields) -> Iterator[Any]:
    """Batches of an Arrow file (``ipc.new_file``) or stream (``ipc.new_stream``, as `datasets` writes), mapped."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader = ipc.open_file(mapped)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            reader = ipc.open_stream(mapped)
            batches = iter(reader)
        columns = fields.columns(reader.schema.names)
        for batch in batches:
            wanted = batch.select(columns)
            for start in range(0, wanted.num_rows, _BATCH_ROWS):
                yield wanted.slice(start, _BATCH_ROWS)


def saved_rows(folder: pathlib.Path, digest: Any, fields: RecordFields) -> Records:
    """Yield the rows of a folder that ``datasets.save_to_disk`` wrote; of several splits, "train". Raises DataError."""
    code = f"import datasets; datasets.load_from_disk({str(folder)!r}).to_json('data.jsonl')"
    datasets = _package("datasets", f"reading the data set in {folder}", f"Convert it: {python_command(code)}")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever is wrong with the files, and with their version
        raise DataError(
            f"`datasets` cannot load {folder}: {first_line(error)}",
            remedy=f"Save it again with this version of `datasets`, or convert it: {python_command(code)}",
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded:
            (first, *_) = loaded
            raise DataError(
                f"the data set in {folder} has no split train; its splits are {', '.join(loaded)}",
                remedy=f"Pass the folder of one split: {folder / first}",
            )
        loaded = loaded["train"]
    return _rows(loaded, digest, fields)


def hub_rows(source: str, digest: Any, fields: RecordFields) -> Records:
    """Yield the rows of a data set of the hub, "owner/name" or "owner/name:split"; the split is "train" by default.

    Raises DataError: neither a file nor a data set has this name, the hub cannot be reached, or the data set has
    several configurations.
    """
    return _rows(load_hub(source), digest, fields)


@functools.lru_cache(maxsize=2)
def load_hub(source: str) -> Any:
    """The `datasets.Dataset` of an id of the hub, or of its copy in the cache, loaded once. Raises DataError."""
    name, _, split = source.partition(":")
    reason = unreachable(endpoint())
    if reason:
        go_offline()  # before `datasets` is imported, which then reads the environment
    what = f"{source} is not a file here; reading the data set of that name from the hub"
    datasets = _package("datasets", what, "Check the path if a file is meant.")
    split = split or "train"
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # errors of the network, of the hub, of the data set
        configuration = "'CONFIGURATION', " if "onfig" in str(error) else ""
        code = f"import datasets; datasets.load_dataset({name!r}, {configuration}split={split!r}).to_json('data.jsonl')"
        raise DataError(
            f"{source} is not a file here, and not a data set that can be loaded from the hub: "
            f"{reason or first_line(error)}",
            remedy=f"Convert it where there is a network: {python_command(code)}",
        ) from error


def _rows(loaded: Any, digest: Any, fields: RecordFields) -> Records:
    """Yield the rows of a `datasets.Dataset`; ``digest`` sees them as JSON."""
    table = loaded.select_columns(fields.columns(loaded.column_names))
    number = 0
    for batch in table.iter(batch_size=_BATCH_ROWS):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(names, values, strict=True))
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            yield Place(number, "row"), row


def _package(name: str, what: str, otherwise: str) -> Any:
    """Import an optional package. Raises DataError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{what} needs the package {package}, which is not installed",
            remedy=f"Run `pip install 'edgefed[data]'`. {otherwise}",
        ) from error
