"""User data on its way to the model: a file or silo -> examples -> a held-out share -> blocks of token ids.

    corpus = load_corpus("notes.jsonl", held_out_share=0.1, seed=0)
    blocks = encode_examples(corpus.train, tokenizer, sequence_length=256)
    for input_ids, labels in blocks.batches(8, generator): ...

`edgefed.training.records` defines the record forms, `edgefed.training.encoding` turns text into ids and a loss mask.
The text is private: nothing here logs or sends it, and error messages quote line numbers, field names and roles, never
contents.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgefed.embedded.silos import Document, load_silo
from edgefed.errors import DataError
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.records import BadRecord, Example, Segment, cut_passages, parse_record

__all__ = [
    "Corpus",
    "Example",
    "LineProblem",
    "LoadedData",
    "Segment",
    "TokenBlocks",
    "encode_examples",
    "load_corpus",
    "load_examples",
    "split_held_out",
]

SILO_PREFIX = "silo:"
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")

MAX_PROBLEMS_SHOWN = 5
HOPELESS_LINES = 1000  # bad lines without a good record, after which the file is refused: it has another format


@dataclass(frozen=True)
class LineProblem:
    """A line that cannot be used.

    Attributes:
        line: its number in the file, from 1.
        reason: what is wrong with it.

    """

    line: int
    reason: str

    def __str__(self) -> str:
        """Return the problem with its line, for the user."""
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class LoadedData:
    """The examples of one source; `sha256` is over the uncompressed bytes (of a silo: over its documents)."""

    examples: list[Example]
    problems: list[LineProblem]
    source: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """The examples of one source, split into a training and a held-out part."""

    train: list[Example]
    held_out: list[Example]
    problems: list[LineProblem]
    sha256: str
    source: str


def load_examples(source: str) -> LoadedData:
    """Read `source`: the path of a .txt, .jsonl, .txt.gz or .jsonl.gz file, or `silo:NAME`.

    A text file becomes passages of 1,000-2,000 characters, a silo one example per training document (without its
    held-out documents), a .jsonl file one example per line. Lines that cannot be used are returned as `problems`.

    Raises:
        DataError: no such file or silo, a folder, an unknown suffix, not UTF-8, damaged gzip, or no usable example.

    """
    if source.startswith(SILO_PREFIX):
        silo = load_silo(source[len(SILO_PREFIX) :])
        return LoadedData(_document_examples(silo.train), [], source, silo.sha256)
    path = pathlib.Path(source).expanduser()
    name = path.name.lower()
    if path.is_dir():
        raise DataError(f"{source} is a directory, not a file")
    if not name.endswith(SUFFIXES):
        raise DataError(
            f"{source} has an unknown suffix; known suffixes are {', '.join(SUFFIXES)} and {SILO_PREFIX}NAME"
        )
    if not path.exists():
        raise DataError(f"file not found: {source}", remedy="Check the path; it is relative to the current folder.")
    digest = hashlib.sha256()
    lines = read_lines(path, digest)
    problems: list[LineProblem] = []
    if name.endswith((".txt", ".txt.gz")):
        examples = [Example((Segment(passage, in_loss=True),)) for passage in cut_passages(lines)]
    else:
        examples = _parse_lines(source, lines, problems)
    if not examples and not problems:
        raise DataError(f"{source} is empty")
    if not examples:
        raise nothing_usable(source, problems)
    return LoadedData(examples, problems, source, digest.hexdigest())


def split_held_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return (train, held_out), about `share` of the records held out; both keep the order of `examples`.

    The choice depends on seed and content alone. Equal records stay together, so that no held-out record is trained
    on. With a positive share and at least two different records neither side is empty; share 0, or only one distinct
    record, holds out nothing.

    Raises:
        DataError: `share` is outside [0, 1).

    """
    if not 0 <= share < 1:
        raise DataError(f"the held-out share must be at least 0 and less than 1, not {share}")
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_example_key(example, seed), []).append(index)
    if share == 0 or len(groups) < 2:
        return list(examples), []
    goal = max(1, round(share * len(examples)))
    chosen: set[int] = set()
    ordered: list[list[int]] = [groups[key] for key in sorted(groups)]
    for group in ordered[:-1]:
        if len(chosen) + len(group) <= goal:
            chosen.update(group)
    # Every record is repeated more often than the goal: the rarest one overshoots least.
    sizes = [len(group) for group in ordered]
    chosen = chosen or set(ordered[sizes.index(min(sizes))])
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]


def load_corpus(source: str, held_out_share: float, seed: int) -> Corpus:
    """Read `source` as `load_examples` does and hold out a share of the records.

    A silo brings its own held-out files, which are used for any share and seed: they must never be trained on.

    Raises:
        DataError: as `load_examples` and `split_held_out`.

    """
    if source.startswith(SILO_PREFIX):
        silo = load_silo(source[len(SILO_PREFIX) :])
        return Corpus(_document_examples(silo.train), _document_examples(silo.held_out), [], silo.sha256, source)
    loaded = load_examples(source)
    train, held_out = split_held_out(loaded.examples, held_out_share, seed)
    return Corpus(train, held_out, loaded.problems, loaded.sha256, source)


def _example_key(example: Example, seed: int) -> str:
    """Return a digest of seed and content, the same on every machine and Python version (repr is not)."""
    digest = hashlib.sha256(str(seed).encode())
    for segment in example.segments:
        digest.update(f"\0{int(segment.in_loss)}{segment.role or ''}\0".encode())
        digest.update(segment.text.encode("utf-8"))
        if segment.fields:
            digest.update(json.dumps(segment.fields, sort_keys=True).encode())
    if example.tools:
        digest.update(json.dumps(example.tools, sort_keys=True).encode())
    return digest.hexdigest()


def _document_examples(documents: Sequence[Document]) -> list[Example]:
    return [Example((Segment(document.text, in_loss=True),)) for document in documents]


def _parse_lines(source: str, lines: Iterator[str], problems: list[LineProblem]) -> list[Example]:
    """Return the examples of the lines and append the others to `problems`."""
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        try:
            examples.append(parse_record(line, number))
        except BadRecord as error:
            problems.append(LineProblem(number, str(error)))
        if not examples and len(problems) >= HOPELESS_LINES:
            raise nothing_usable(source, problems)
    return examples


def problem_notes(source: str, problems: Sequence[LineProblem | str]) -> list[str]:
    """Return notes on the lines that cannot be used: the first five, and how many there are."""
    notes = [f"{source} {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        notes.append(f"{source}: {len(problems)} lines in all cannot be used")
    return notes


def nothing_usable(source: str, problems: Sequence[LineProblem]) -> DataError:
    """Return the error of a file without a usable line; it names the first three."""
    shown = "; ".join(str(problem) for problem in problems[:3])
    return DataError(f"{source} has no usable record in {len(problems)} lines: {shown}")


def read_lines(path: pathlib.Path, digest: Any) -> Iterator[str]:
    """Yield the lines of `path` as text, unzipped if gzipped, with line feeds; `digest` sees the unzipped bytes.

    Raises:
        DataError: unreadable, damaged gzip, or not UTF-8.

    """
    number = 0
    first = b""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
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
        raise DataError(
            f"cannot read {path} after line {number}: {error}", remedy="Check the permissions, or write the file again."
        ) from error


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
