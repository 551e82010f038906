"""English text for pretraining: Debian packages of documentation, and sets that no experiment trains or tests on.

    dict-gcide                dictionary entries, without their quotations of Shakespeare
    linux-doc-X.Y             the kernel's documentation as reStructuredText, without translations
    manpages, manpages-dev    manual pages, as plain text
    mcq_math_tasks            the training questions of ARC, BoolQ and OpenBookQA that are in no test set
    shakespeare_by_role       the roles that `text_sets` never draws as clients

Dolly, AG News and GSM8K are left out: `text_sets` divides them anew for every seed, so any of their records may be
held out. `apt-get download PACKAGE` fetches a package without installing it.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from text_sets import LARGEST_ROLES, TASKS

from edgefed.embedded.silos import Document

TRAINING_TASKS = ("ARC-Challenge", "ARC-Easy", "boolq", "openbookqa")
SHORTEST = 200
"""Characters below which dictionary entries are joined to the next one, and pages are left out."""
MACRO = re.compile(r"^[.'](\w+)\s*(.*)$")
"""A line of a manual page that is a request: its name and its arguments."""
HEADINGS, JOINED = {"SH", "SS"}, {"BR", "RB", "IR", "RI", "BI", "IB"}
SILENT = {"TH", "so", "ig", "de", "ds", "nr", "if", "ie", "el", "TS", "TE", "ft", "in", "ad", "ti"}
ESCAPES = {
    r"\-": "-",
    r"\(aq": "'",
    r"\[aq]": "'",
    r"\(dq": '"',
    r"\(bu": "*",
    r"\[bu]": "*",
    r"\[em]": " - ",
    r"\e": "\\",
    r"\&": "",
    r"\ ": " ",
}


def documents_of(packages: list[Path], data: Path | None) -> dict[str, list[Document]]:
    """Return the documents of each source, {package or set: documents}.

    Raises SystemExit for a file that is not a Debian package, one without text of a known kind, and an absent set.
    """
    found = {path.name.partition("_")[0]: list(_package(path)) for path in packages}
    if data is not None:
        found["questions"] = list(_questions(data))
        found["shakespeare"] = list(_roles(data))
    for name, documents in found.items():
        if not documents:
            raise SystemExit(f"no text found in {name}: it has no dictionary, manual pages or kernel documentation")
    return found


def _package(path: Path) -> Iterator[Document]:
    with tarfile.open(fileobj=io.BytesIO(_data_archive(path))) as archive:
        for member in archive:
            if not member.isfile():
                continue
            name, file = member.name.removeprefix("./"), archive.extractfile(member)
            assert file is not None
            if name.endswith(".dict.dz"):
                yield from _dictionary(_unpacked(file.read()))
            elif re.search(r"/man/man\d/.*\.gz$", name):
                text = _manual_page(_unpacked(file.read()))
            elif re.search(r"/Documentation/(?!translations/).*\.(rst|txt)\.gz$", name):
                text = _unpacked(file.read())
            else:
                continue
            if not name.endswith(".dict.dz") and len(text) >= SHORTEST:
                yield Document(name, text)


def _data_archive(path: Path) -> bytes:
    """The member data.tar.* of a Debian package, an ar archive: headers of 60 bytes, members at even places."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    if not content.startswith(b"!<arch>\n"):
        raise SystemExit(f"{path} is not a Debian package; fetch one with: apt-get download dict-gcide")
    place = 8
    while place + 60 <= len(content):
        name, size = content[place : place + 16].decode("ascii", "replace").strip(), content[place + 48 : place + 58]
        start, end = place + 60, place + 60 + int(size)
        if name.startswith("data.tar"):
            if name.rstrip("/").endswith(".zst"):
                raise SystemExit(f"{path} is compressed with zstd, which Python cannot read; use Debian's package")
            if end > len(content):
                break
            return content[start:end]
        place = end + end % 2
    raise SystemExit(f"{path} is incomplete; fetch it again")


def _unpacked(data: bytes) -> str:
    return gzip.decompress(data).decode("utf-8", "ignore").replace("\r\n", "\n")


def _dictionary(text: str) -> Iterator[Document]:
    """Entries, which start at the margin, joined up to a few hundred characters.

    Marks of origin, and the paragraphs that quote Shakespeare, are left out: an experiment may hold them out.
    """
    entries = re.split(r"\n\n(?=\S)", text.partition("\n\nA \\")[2])
    kept: list[str] = []
    for number, entry in enumerate(entries):
        paragraphs = [part for part in re.sub(r"\n *\[[^\]\n]*\]\n", "\n", entry + "\n").split("\n\n")]
        text = "\n\n".join(part.rstrip() for part in paragraphs if part.strip() and "--Shak" not in part)
        kept.append(re.sub(r"\n +", "\n", text))
        if sum(map(len, kept)) >= SHORTEST:
            yield Document(f"dictionary/{number}", "\n\n".join(kept))
            kept = []


def _manual_page(source: str) -> str:
    r"""A manual page without its macros and escapes: `.B text` becomes text, `\fI` nothing, headings a line."""
    lines = []
    for raw in source.splitlines():
        line = raw
        if line.startswith((r".\"", r"'\"")):
            continue
        request = MACRO.match(line)
        if request:
            name, arguments = request.groups()
            if name in SILENT:
                continue
            if name in HEADINGS:
                line = "\n" + arguments.strip('"')
            elif name in JOINED:
                line = "".join(re.findall(r'"[^"]*"|\S+', arguments)).replace('"', "")
            else:
                line = arguments.replace('"', "")
        for escape, plain in ESCAPES.items():
            line = line.replace(escape, plain)
        line = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\s[-+]?\d|\\[|^]", "", line)
        lines.append(line if not request or line.strip() else "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _read(path: Path) -> str:
    if not path.exists():
        raise SystemExit(f"{path} is absent; experiments/README.md says where to get it")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _questions(data: Path) -> Iterator[Document]:
    """Questions with their answers, as `text_sets` writes them; none that is in a test set."""
    folder = data / "mcq_math_tasks"
    tested = {_plain(row["instruction"]) for task in TASKS for row in json.loads(_read(folder / task / "test.json.gz"))}
    for task in TRAINING_TASKS:
        for index, row in enumerate(json.loads(_read(folder / task / "train.json.gz"))):
            if _plain(row["instruction"]) not in tested:
                yield Document(f"questions/{task}/{index}", f"{row['instruction']}\n{row['output']}")


def _roles(data: Path) -> Iterator[Document]:
    """The speeches of the smaller roles, a document per play; none that one of the larger roles speaks, too."""
    rows = [json.loads(line) for line in _read(data / "shakespeare_by_role" / "speeches.jsonl.gz").splitlines()]
    by_role = defaultdict(list)
    for row in rows:
        by_role[f"{row['play']} {row['role']}"].append(row["text"])
    largest = set(sorted(by_role, key=lambda role: -sum(map(len, by_role[role])))[:LARGEST_ROLES])
    theirs = {_plain(text) for role in largest for text in by_role[role]}
    plays = defaultdict(list)
    for row in rows:
        if f"{row['play']} {row['role']}" not in largest and _plain(row["text"]) not in theirs:
            plays[row["play"]].append(f"{row['role']}\n{row['text']}")
    for play, speeches in sorted(plays.items()):
        yield Document(f"shakespeare/{play}", "\n\n".join(speeches))


def _plain(text: str) -> str:
    """Text without case, punctuation and spaces, for comparisons."""
    return re.sub(r"\W+", "", text.lower())
