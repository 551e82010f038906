"""Text silos: the standard library of the running Python as federated clients with different distributions.

Each silo is one package of the standard library (`asyncio`, `email`, ...); `topics` is the language reference that
`pydoc` includes, the only prose among them. Every machine that runs edgefed has this text, so a demonstration needs no
download. It differs between Python versions: report `Silo.sha256` and the Python version with every result.

This module does not depend on models or tokenizers, does not import torch, and reads files only when it is called.
"""

from __future__ import annotations

import hashlib
import importlib
import pathlib
import sys
import sysconfig
import tokenize
from dataclasses import dataclass

from edgefed.errors import DataError

SILOS: tuple[str, ...] = (
    "asyncio",
    "email",
    "unittest",
    "xml",
    "multiprocessing",
    "importlib",
    "http",
    "logging",
    "topics",
)

HELD_OUT_SHARE = 0.2  # of the bytes of a silo
HELD_OUT_CEILING = 0.25  # files that would raise the held-out share above this are for training: one can be 40 %

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

# Excluded from pretraining: tables, packages that newer Pythons removed or that distributions package separately, the
# text of the `topics` silo, the test suite, and files of the machine instead of Python.
_NOT_PRETRAINING = frozenset(
    {
        "distutils",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "sitecustomize",
        "test",
        "tkinter",
        "turtledemo",
        "usercustomize",
    }
)


@dataclass(frozen=True)
class Document:
    r"""One file (or one topic of the language reference).

    Attributes:
        name: path below the standard library with forward slashes (`email/header.py`), or `topics/<topic>`.
        text: the decoded source, newlines as `\n`.

    """

    name: str
    text: str


@dataclass(frozen=True)
class Silo:
    """The data of one client.

    Attributes:
        name: one of `SILOS`.
        train: the documents to train on, ordered by name; never empty.
        held_out: other whole documents for evaluation, ordered by name; never empty.
        sha256: hex digest over every name and text, train and held-out.

    """

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    sha256: str


def load_silo(name: str, library: pathlib.Path | None = None) -> Silo:
    """Read the silo `name` from `library`, by default the standard library of the running Python.

    About a fifth of the bytes is held out as whole documents, chosen by a hash of their names. The same Python version
    gives the same split on every machine, and no file is on both sides.

    Raises:
        DataError: `name` is not one of `SILOS`, or this Python comes without the source text of it.

    """
    if name not in SILOS:
        raise DataError(
            f"unknown silo {name!r}; it must be one of {', '.join(SILOS)}",
            remedy="Use one of the listed names, as in silo:asyncio.",
        )
    library = library or _standard_library()
    documents = _topic_documents() if name == "topics" else _package_documents(name, library)
    documents = [document for document in documents if document.text.strip()]
    if len(documents) < 2:
        raise DataError(
            f"silo {name!r} needs at least two readable documents; found {len(documents)} in {library}",
            remedy="Use a Python that ships the source of its standard library, or pass a file instead of a silo.",
        )
    held_out_names = select_held_out(documents)
    return Silo(
        name=name,
        train=tuple(document for document in documents if document.name not in held_out_names),
        held_out=tuple(document for document in documents if document.name in held_out_names),
        sha256=documents_sha256(documents),
    )


def pretraining_documents(library: pathlib.Path | None = None) -> tuple[Document, ...]:
    """Return the documents of `library` outside every silo, ordered by name, so that the silos stay unseen.

    Raises:
        DataError: this Python comes without the source text of its standard library.

    """
    root = library or _standard_library()
    excluded = _NOT_PRETRAINING.union(SILOS)
    documents = []
    for name in sorted(sys.stdlib_module_names):
        if name in excluded:
            continue
        if (root / name).is_dir():
            documents += _package_documents(name, root)
        elif (root / f"{name}.py").is_file():
            documents.append(_read_document(root / f"{name}.py", root))
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError(
            f"no standard library source found in {root}",
            remedy="Use a Python that ships the source of its standard library.",
        )
    return tuple(documents)


def documents_sha256(documents: list[Document] | tuple[Document, ...]) -> str:
    """Return the hex digest over names and texts, each closed by a NUL, so that moved boundaries change it."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(part.encode("utf-8"))
            digest.update(b"\0")
    return digest.hexdigest()


def document_order(document: Document) -> str:
    """Return a sort key that scatters documents by name alone, the same on every machine and Python version."""
    return hashlib.sha256(document.name.encode("utf-8")).hexdigest()


def select_held_out(documents: list[Document]) -> set[str]:
    """Return the names of the held-out documents: in hash order, each that fits, until the share is reached."""
    sizes = {document.name: len(document.text.encode("utf-8")) for document in documents}
    total = sum(sizes.values())
    chosen: set[str] = set()
    held_bytes = 0
    for document in sorted(documents, key=document_order):
        if held_bytes >= HELD_OUT_SHARE * total:
            break
        if held_bytes + sizes[document.name] <= HELD_OUT_CEILING * total:
            chosen.add(document.name)
            held_bytes += sizes[document.name]
    # With two or three large files none fits; holding out the smallest removes the least training text.
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def _standard_library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _package_documents(package: str, root: pathlib.Path) -> list[Document]:
    """Return the `.py` files below `root/package` except tests, ordered by name; empty if the folder is missing."""
    paths = [
        path
        for path in (root / package).rglob("*.py")
        if not _TEST_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith("test_")
    ]
    return sorted((_read_document(path, root) for path in paths), key=lambda document: document.name)


def _read_document(path: pathlib.Path, root: pathlib.Path) -> Document:
    # tokenize.open honours the coding cookie and turns every newline into \n, as Python itself reads the file.
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}", remedy="Repair this Python's standard library, or pass a file of your own."
        ) from error
    return Document(path.relative_to(root).as_posix(), text)


def _topic_documents() -> list[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"this Python comes without pydoc_data.topics: {error}", remedy="Use another silo, or pass a file."
        ) from error
    return [Document(f"topics/{name}", topics[name]) for name in sorted(topics)]
