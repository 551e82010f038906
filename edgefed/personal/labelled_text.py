"""A client's labelled texts: a .jsonl or a .csv file, optionally compressed as .gz.

    {"text": "...", "label": "sports"}          one JSON object per line; ``sentence`` is accepted for ``text``
    text,label                                  the first line of a CSV file names its columns; others are ignored

Labels are names or integers. If every label of the file is an integer, it is the number of its class, from 0. Otherwise
labels are names, and the classes are the sorted names. The content of texts is never logged or part of an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgefed.errors import DataError
from edgefed.training.data import HOPELESS_LINES, LineProblem, nothing_usable
from edgefed.training.record_files import Content, csv_records, json_lines, read_lines
from edgefed.training.records import BadRecord, text_field

if TYPE_CHECKING:
    from edgefed.personal.samples import IntArray

TEXT_SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
TEXT_FIELDS = ("text", "sentence")
MAX_CLASSES = 65536
"""Maximum number of classes, of texts and of images; a header for more would take gigabytes."""
FORMS = 'Use a .jsonl file with {"text": ..., "label": ...} per line, or a .csv file with the columns text and label.'

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """The content of a file of labelled texts."""

    texts: tuple[str, ...]
    labels: IntArray
    """(N,) indices into ``classes``."""
    classes: tuple[str, ...]
    problems: tuple[LineProblem, ...]
    """Lines without a usable example."""
    sha256: str
    """Of the uncompressed bytes."""

    def __len__(self) -> int:
        return len(self.texts)


def load_labelled_texts(path: str | Path) -> LabelledTexts:
    """Read labelled texts. Invalid lines are returned as ``problems`` as long as others are valid.

    Raises:
        DataError: the file does not exist, has another suffix, is not UTF-8, is damaged, lacks the columns, or has no
            usable line.
    """
    path = Path(path).expanduser()
    digest = hashlib.sha256()
    parsed = _parsed_rows(path, digest)
    rows: list[tuple[int, str, str]] = []  # line, text, label
    problems: list[LineProblem] = []
    for number, row in parsed:
        if isinstance(row, BadRecord):
            problems.append(LineProblem(number, str(row)))
        else:
            rows.append((number, *row))
        if not rows and len(problems) >= HOPELESS_LINES:
            raise nothing_usable(str(path), problems)
    if rows and all(_INTEGER.fullmatch(label) for _, _, label in rows):
        rows, wrong = _with_numbers_in_range(rows)
        problems = sorted([*problems, *wrong], key=lambda problem: problem.line)
        labels = np.array([int(label) for _, _, label in rows], np.int64)
        classes = tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))
    else:
        classes = tuple(sorted({label for _, _, label in rows}))
        index = {label: number for number, label in enumerate(classes)}
        labels = np.array([index[label] for _, _, label in rows], np.int64)
    if not rows and not problems:
        raise DataError(f"{path} is empty: it has no example", remedy=FORMS)
    if not rows:
        raise nothing_usable(str(path), problems)
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{path} has {len(classes):,} classes, at most {MAX_CLASSES:,} are allowed", remedy=FORMS)
    return LabelledTexts(tuple(text for _, text, _ in rows), labels, classes, tuple(problems), digest.hexdigest())


def check_labelled_texts(path: str | Path) -> None:
    """Raise DataError if the file has an unusable format, or neither of its first lines is usable."""
    rows = itertools.islice(_parsed_rows(Path(path).expanduser(), hashlib.sha256()), HOPELESS_LINES)
    problems = []
    for number, row in rows:
        if not isinstance(row, BadRecord):
            return
        problems.append(LineProblem(number, str(row)))
    if problems:
        raise nothing_usable(str(path), problems)


def _parsed_rows(path: Path, digest: Any) -> Iterator[tuple[int, tuple[str, str] | BadRecord]]:
    """Each row with its number. Raises DataError for a file that is missing or has another format."""
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a file", remedy=FORMS)
    name = path.name.lower()
    if not name.endswith(TEXT_SUFFIXES):
        raise DataError(f"unsupported suffix of {path}; supported are {', '.join(TEXT_SUFFIXES)}", remedy=FORMS)
    if not path.exists():
        raise DataError(f"file not found: {path}", remedy="Check the path; it is relative to the current directory.")
    lines = read_lines(path, digest)
    return _csv_rows(path, lines) if name.endswith((".csv", ".csv.gz")) else _json_rows(lines)


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, tuple[str, str] | BadRecord]]:
    return ((place.number, _row_of(content)) for place, content in json_lines(lines))


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, tuple[str, str] | BadRecord]]:
    """Rows with the number of their first line; a quoted text may span several lines."""

    def on_header(header: list[str]) -> list[str]:
        names = [name.lower() for name in header]
        if "label" not in names or not any(field in names for field in TEXT_FIELDS):
            raise DataError(
                f"the first line of {path} names {len(names)} columns, but not both text and label", remedy=FORMS
            )
        return names

    return ((number, _row_of(row)) for number, row in csv_records(path, lines, on_header=on_header))


def _row_of(content: Content) -> tuple[str, str] | BadRecord:
    try:
        return content if isinstance(content, BadRecord) else _row(cast("Mapping[str, Any]", content))
    except BadRecord as error:
        return error


def _row(record: Mapping[str, Any]) -> tuple[str, str]:
    """(text, label) of a record. Raises BadRecord."""
    field = next((name for name in TEXT_FIELDS if name in record), TEXT_FIELDS[0])
    text = text_field(record, field)
    label = record.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        return text, str(label)
    if "label" in record and not isinstance(label, str):
        raise BadRecord("label must be a name or an integer")
    return text, text_field(record, "label").strip()


def _with_numbers_in_range(
    rows: list[tuple[int, str, str]],
) -> tuple[list[tuple[int, str, str]], list[LineProblem]]:
    """The rows whose label is a valid class number, and the problems of the others."""
    good, wrong = [], []
    for row in rows:
        if 0 <= int(row[2]) < MAX_CLASSES:
            good.append(row)
        else:
            wrong.append(LineProblem(row[0], f"label {row[2]} is out of range: must be 0 to {MAX_CLASSES - 1}"))
    return good, wrong
