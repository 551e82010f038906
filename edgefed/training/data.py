"""User data on its way to the model: a source -> examples -> a held-out share -> blocks of token ids.

    corpus = load_corpus("notes.jsonl", held_out_share=0.1, seed=0)
    blocks = encode_examples(corpus.train, tokenizer, sequence_length=256)      # edgefed.training.encoding
    for input_ids, labels in blocks.batches(8, generator): ...

`edgefed.training.record_files` reads the formats, `edgefed.training.records` defines the record forms, and
`edgefed.training.encoding` turns text into ids and a loss mask. The text stays in its files: `Corpus.train` and
`Corpus.held_out` read it each time they are iterated. It is private: nothing here logs or sends it, and error messages
quote line numbers, field names and roles, never contents. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefed.embedded.silos import Document, load_silo
from edgefed.errors import DataError
from edgefed.progress import counted
from edgefed.training.conversions import how_to_name_fields
from edgefed.training.record_files import Content, Place, read_source
from edgefed.training.records import AUTOMATIC, BadRecord, Example, RecordFields, Segment, parse_record

__all__ = [
    "AUTOMATIC",
    "Corpus",
    "Example",
    "Examples",
    "LineProblem",
    "LoadedData",
    "RecordFields",
    "Segment",
    "check_data",
    "load_corpus",
    "load_examples",
    "parse_records",
    "split_held_out",
]

SILO_PREFIX = "silo:"

MAX_PROBLEMS_SHOWN, MAX_FORMS_SHOWN = 5, 3
_KEY_BYTES = 16
HOPELESS_LINES = 1000  # bad lines without a good record, after which the file is refused: it has another format

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LineProblem:
    """A line, row or record that cannot be used.

    Attributes:
        line: its number, from 1.
        reason: what is wrong with it.
        unit: what is counted: "line", "row" or "record".
        file: its file, where the source is a folder.

    """

    line: int
    reason: str
    unit: str = "line"
    file: str = ""

    def __str__(self) -> str:
        """Return the problem with its place, for the user."""
        return f"{Place(self.line, self.unit, self.file)}: {self.reason}"


@dataclass(frozen=True)
class LoadedData:
    """The examples of one source; `sha256` is over the uncompressed bytes (of a silo: over its documents)."""

    examples: list[Example]
    problems: list[LineProblem]
    source: str
    sha256: str


class Examples(Collection[Example]):
    """Some examples of a source, read from it in each iteration. An iteration to the end compares the checksum."""

    def __init__(self, source: str, fields: RecordFields, chosen: BoolArray, sha256: str):
        self._source, self._fields, self._chosen, self._sha256 = source, fields, chosen, sha256

    def __len__(self) -> int:
        return int(self._chosen.sum())

    def __iter__(self) -> Iterator[Example]:
        digest = hashlib.sha256()
        found = _iter_examples(self._source, self._fields, digest, [])
        # The records and then the checksum: a file that has changed has other records.
        for example, chosen in zip(found, self._chosen, strict=False):
            if chosen:
                yield example
        if next(found, None) is not None or digest.hexdigest() != self._sha256:
            raise DataError(
                f"{self._source} was changed while it was in use", remedy="Leave the file as it is, and join again."
            )

    def __contains__(self, example: object) -> bool:
        return any(example == other for other in self)


@dataclass(frozen=True)
class Corpus:
    """The examples of one source, split into a training and a held-out part."""

    train: Collection[Example]
    held_out: Collection[Example]
    problems: list[LineProblem]
    sha256: str
    source: str
    forms: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    """How many records were read from which fields; none for plain text and for a silo."""
    repeated: int = 0
    """Records that are equal to an earlier one."""
    deduplicated: bool = False
    """Whether these are left out."""

    def notes(self) -> list[str]:
        """Lines for the user: which fields were read, and which records cannot be used."""
        counts = sorted(self.forms.items(), key=lambda form: -form[1])
        read = [f"{counted(count, 'record')} with {', '.join(fields)}" for fields, count in counts[:MAX_FORMS_SHOWN]]
        more = sum(count for _, count in counts[MAX_FORMS_SHOWN:])
        read += [f"{more:,} with others"] if more else []
        notes = [f"{self.source}: {'; '.join(read)}"] if read else []
        if self.repeated:
            what = ", left out" if self.deduplicated else "; `deduplicate` leaves them out"
            notes.append(f"{self.source}: repeated records: {self.repeated:,}{what}")
        return notes + problem_notes(self.source, self.problems)


def load_examples(source: str, fields: RecordFields = AUTOMATIC) -> LoadedData:
    """Read `source`: `silo:NAME`, or what `edgefed.training.record_files.read_source` reads.

    A text file becomes passages of 1,000-2,000 characters, a silo one example per training document (without its
    held-out documents); of other formats, each record is an example. Lines that cannot be used are returned as
    `problems`.

    Raises:
        DataError: not found, an unknown suffix, not UTF-8, damaged, a missing package, or no usable example.

    """
    digest = hashlib.sha256()
    problems: list[LineProblem] = []
    examples = list(_iter_examples(source, fields, digest, problems))
    return LoadedData(examples, problems, source, _silo_sha256(source) or digest.hexdigest())


def check_data(source: str, fields: RecordFields = AUTOMATIC) -> None:
    """Raise DataError unless `source` has a usable record, without reading further than that."""
    next(_iter_examples(source, fields, hashlib.sha256(), []))


def split_held_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return (train, held_out), about `share` of the records held out; both keep the order of `examples`.

    The choice depends on seed and content alone. Equal records stay together, so that no held-out record is trained
    on. With a positive share and at least two different records neither side is empty; share 0, or only one distinct
    record, holds out nothing.

    Raises:
        DataError: `share` is outside [0, 1).

    """
    held_out = _choose_held_out(b"".join(_example_key(example, seed) for example in examples), share)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, chosen in zip(examples, held_out, strict=True):
        sides[int(chosen)].append(example)
    return sides


def load_corpus(source: str, held_out_share: float, seed: int, fields: RecordFields = AUTOMATIC) -> Corpus:
    """Read `source` once, as `load_examples` does, and hold out a share of the records as `split_held_out` does.

    The text does not stay in memory: the two sides read it again. A silo brings its own held-out files, which are used
    for any share and seed: they must never be trained on.

    Raises:
        DataError: as `load_examples` and `split_held_out`.

    """
    if source.startswith(SILO_PREFIX):
        silo = load_silo(source[len(SILO_PREFIX) :])
        return Corpus(_document_examples(silo.train), _document_examples(silo.held_out), [], silo.sha256, source)
    digest = hashlib.sha256()
    problems: list[LineProblem] = []
    keys = bytearray()
    forms: Counter[tuple[str, ...]] = Counter()
    for example in _iter_examples(source, fields, digest, problems):
        keys += _example_key(example, seed)
        forms.update([example.read] if example.read else [])
    first = _first_of_equal(bytes(keys))
    held_out = _choose_held_out(bytes(keys), held_out_share)
    used = first if fields.deduplicate else np.ones_like(first)
    sha256 = digest.hexdigest()
    train, kept = (Examples(source, fields, chosen & used, sha256) for chosen in (~held_out, held_out))
    return Corpus(train, kept, problems, sha256, source, forms, int((~first).sum()), fields.deduplicate)


def _by_content(keys: bytes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of records by key, equal ones in their own order, and where each key starts; `_KEY_BYTES` bytes a key."""
    words = np.frombuffer(keys, ">u8").reshape(-1, _KEY_BYTES // 8)
    order = np.lexsort(words.T[::-1])
    return order, np.flatnonzero(np.r_[True, (words[order][1:] != words[order][:-1]).any(axis=1)][: len(words)])


def _first_of_equal(keys: bytes) -> BoolArray:
    """(N,) whether no earlier record has the same key."""
    order, starts = _by_content(keys)
    first = np.zeros(len(order), dtype=bool)
    first[order[starts]] = True
    return first


def _choose_held_out(keys: bytes, share: float) -> BoolArray:
    """(N,) whether each record is held out, given the `_KEY_BYTES` bytes of each."""
    if not 0 <= share < 1:
        raise DataError(f"the held-out share must be at least 0 and less than 1, not {share}")
    order, starts = _by_content(keys)
    held_out = np.zeros(len(order), dtype=bool)
    if share == 0 or len(starts) < 2:
        return held_out
    groups = np.split(order, starts[1:])
    goal = max(1, round(share * len(order)))
    count = 0
    for group in groups[:-1]:
        if count + len(group) <= goal:
            held_out[group] = True
            count += len(group)
    if not count:  # every record is repeated more often than the goal: the rarest one overshoots least
        held_out[min(groups, key=len)] = True
    return held_out


def _example_key(example: Example, seed: int) -> bytes:
    """Return a digest of seed and content, the same on every machine and Python version (repr is not)."""
    digest = hashlib.sha256(str(seed).encode())
    for segment in example.segments:
        digest.update(f"\0{int(segment.in_loss)}{segment.role or ''}\0".encode())
        digest.update(segment.text.encode("utf-8"))
        if segment.fields:
            digest.update(json.dumps(segment.fields, sort_keys=True).encode())
    if example.tools:
        digest.update(json.dumps(example.tools, sort_keys=True).encode())
    return digest.digest()[:_KEY_BYTES]


def _silo_sha256(source: str) -> str | None:
    return load_silo(source[len(SILO_PREFIX) :]).sha256 if source.startswith(SILO_PREFIX) else None


def _document_examples(documents: Sequence[Document]) -> list[Example]:
    return [Example((Segment(document.text, in_loss=True),)) for document in documents]


def _iter_examples(source: str, fields: RecordFields, digest: Any, problems: list[LineProblem]) -> Iterator[Example]:
    """Yield the examples of a source and append the records that cannot be used to `problems`."""
    if source.startswith(SILO_PREFIX):
        yield from _document_examples(load_silo(source[len(SILO_PREFIX) :]).train)
        return
    yield from parse_records(read_source(source, digest, fields), source, fields, problems)


def parse_records(
    records: Iterator[tuple[Place, Content]], source: str, fields: RecordFields, problems: list[LineProblem]
) -> Iterator[Example]:
    """Yield the examples of records and append those that cannot be used to ``problems``.

    ``source`` names the records in errors. Raises DataError: no record, or none that can be used.
    """
    if fields.text and (fields.prompt or fields.response):
        raise DataError(
            "`text_field` excludes `prompt_field` and `response_field`",
            remedy="Name a text, or a prompt and a response.",
        )
    count = 0
    found: set[str] = set()  # fields of records without a known form
    for place, content in records:
        if isinstance(content, str):
            count += 1
            yield Example((Segment(content, in_loss=True),))
            continue
        try:
            if isinstance(content, BadRecord):
                raise content
            example = parse_record(content, fields, str(place))
        except BadRecord as error:
            problems.append(LineProblem(place.number, str(error), place.unit, place.file))
            if not count and not isinstance(content, BadRecord):
                found.update(content)
            if not count and len(problems) >= HOPELESS_LINES:
                break
            continue
        count += 1
        yield example
    if not count and not problems:
        raise DataError(f"{source} is empty")
    if not count:
        raise nothing_usable(source, problems, how_to_name_fields(source, found) if found else None)


def problem_notes(source: str, problems: Sequence[LineProblem | str]) -> list[str]:
    """Return notes on the lines that cannot be used: the first five, and how many there are."""
    notes = [f"{source} {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        notes.append(f"{source}: {len(problems)} lines in all cannot be used")
    return notes


def nothing_usable(source: str, problems: Sequence[LineProblem], remedy: str | None = None) -> DataError:
    """Return the error of a file without a usable line; it names the first three."""
    shown = "; ".join(str(problem) for problem in problems[:3])
    return DataError(
        f"{source} has no usable record in {counted(len(problems), problems[0].unit)}: {shown}", remedy=remedy
    )
