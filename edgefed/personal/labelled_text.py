"""A client's labelled texts: a .jsonl or a .csv file, each also as .gz.

    {"text": "...", "label": "sports"}          one JSON object a line; ``sentence`` may stand for ``text``
    text,label                                  a CSV file names its columns in the first line; others are passed over

Labels are names or integers. Where every label of the file is an integer, it is the number of its class, from 0; else
every label is a name, and the classes are the names, sorted. What the texts say is never logged and stands in no error.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgefed.errors import DataError
from edgefed.personal.sample_files import MAX_CLASSES
from edgefed.training.data import HOPELESS_LINES, LineProblem, nothing_usable, read_lines
from edgefed.training.records import BadRecord, json_object, text_field

TEXT_SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
TEXT_FIELDS = ("text", "sentence")
FORMS = 'Pass a .jsonl file with {"text": ..., "label": ...} a line, or a .csv file with the columns text and label.'

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """``texts`` and their ``labels`` (N,) int64, indices into ``classes``; ``problems``: lines that gave no example.
    ``sha256``: of the file's bytes, unpacked.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    problems: tuple[LineProblem, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)


def load_labelled_texts(path: str | Path) -> LabelledTexts:
    """Read ``path``. Bad lines do not stop a file that has good ones: they come back as ``problems``.

    Raises:
        DataError: no such file, another suffix, no UTF-8, damaged gzip, no such columns, or not one usable line.

    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file", remedy=FORMS)
    name = path.name.lower()
    if not name.endswith(TEXT_SUFFIXES):
        raise DataError(f"{path} has an unknown suffix; known are {', '.join(TEXT_SUFFIXES)}", remedy=FORMS)
    if not path.exists():
        raise DataError(f"there is no file {path}", remedy="Check the path; it is relative to the current folder.")
    digest = hashlib.sha256()
    lines = read_lines(path, digest)
    parsed = _csv_rows(path, lines) if name.endswith((".csv", ".csv.gz")) else _json_rows(lines)
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
        raise DataError(f"{path} is empty: it holds no example", remedy=FORMS)
    if not rows:
        raise nothing_usable(str(path), problems)
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{path} has {len(classes):,} classes, at most {MAX_CLASSES:,} are allowed", remedy=FORMS)
    return LabelledTexts(tuple(text for _, text, _ in rows), labels, classes, tuple(problems), digest.hexdigest())


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, tuple[str, str] | BadRecord]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, _row(json_object(line))
        except BadRecord as error:
            yield number, error


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, tuple[str, str] | BadRecord]]:
    """Rows with the number of the line that they begin in: a quoted text may go over several."""
    reader = csv.reader(lines, strict=True)
    start = 1
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "label" not in header or not any(field in header for field in TEXT_FIELDS):
            raise DataError(
                f"the first line of {path} names {len(header)} columns, not text and label among them", remedy=FORMS
            )
        start = reader.line_num + 1
        for cells in reader:
            try:
                if cells and len(cells) != len(header):
                    raise BadRecord(f"{len(cells)} columns, the first line names {len(header)}")
                if not cells:
                    raise BadRecord("empty line")
                yield start, _row(dict(zip(header, cells, strict=True)))
            except BadRecord as error:
                yield start, error
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} is no valid CSV in the row that begins in line {start}: {error}",
            remedy="Double the quotes within a quoted text, or write the file as .jsonl.",
        ) from error


def _row(record: dict[str, Any]) -> tuple[str, str]:
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
    """The rows whose numbers may be classes, and what is wrong with the others."""
    good, wrong = [], []
    for row in rows:
        if 0 <= int(row[2]) < MAX_CLASSES:
            good.append(row)
        else:
            wrong.append(LineProblem(row[0], f"label {row[2]} is out of range: allowed are 0 to {MAX_CLASSES - 1}"))
    return good, wrong
