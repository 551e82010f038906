"""A labelled data set divided among clients with different data, and its files.

By class ("pathological"): every client has examples of the same number of classes (McMahan et al., arXiv 1602.05629).
Dirichlet: the clients' shares of each class are drawn from Dir(alpha) (Yurochkin et al., arXiv 1905.12022); the smaller
alpha, the more the clients differ. Both are pure functions: the same seed gives the same indices.

    DIR/client-00.npz ...   images and labels with all class names (or client-00.jsonl of labelled texts)
    DIR/partition.json      settings, sha256 of the source and of each file, counts per client and class
    DIR/partition.png       the counts as bubbles

An existing partition of the same source and settings is not written again; another one in the same folder is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgefed.disk import disk_errors, hash_file, make_folder, write_durably
from edgefed.errors import ConfigError, DataError, StateCorrupt
from edgefed.personal.labelled_text import LabelledTexts
from edgefed.personal.samples import ImageSamples, IntArray
from edgefed.plots import save_partition_picture

MAX_DRAWS = 1000
"""Maximum draws of a Dirichlet partition: about a second for 100 clients and 100 classes."""


def partition_by_class(labels: IntArray, clients: int, classes_per_client: int, seed: int) -> tuple[IntArray, ...]:
    """Divide examples so that each client has exactly ``classes_per_client`` classes.

    The numbers of clients with a class differ by at most one between classes, and its examples are divided evenly among
    them. Every example is used once; if clients * classes_per_client is less than the number of classes, the remaining
    classes are unused.

    Returns:
        Sorted indices into ``labels`` (N,) of each client.

    Raises:
        ConfigError: fewer classes in ``labels`` than ``classes_per_client``, or a number below 1.
        DataError: a class has fewer examples than clients.
    """
    _check_clients(clients)
    classes = np.unique(labels)
    if not 1 <= classes_per_client <= len(classes):
        raise ConfigError(
            f"`classes_per_client` is {classes_per_client}, but the data has {len(classes)} classes",
            remedy=f"Set `classes_per_client` to 1 to {len(classes)}.",
        )
    rng = np.random.default_rng(seed)
    holders: list[list[int]] = [[] for _ in classes]
    for client in range(clients):
        # Classes with the fewest clients come first, in random order, so their numbers differ by at most one.
        order = sorted(rng.permutation(len(classes)).tolist(), key=lambda place: len(holders[place]))
        for place in order[:classes_per_client]:
            holders[place].append(client)
    parts: list[list[IntArray]] = [[] for _ in range(clients)]
    for label, of_class in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(of_class):
            raise DataError(
                f"class {label} has {len(rows)} examples, too few for {len(of_class)} clients",
                remedy="Use fewer clients or fewer classes per client, or remove the class.",
            )
        if of_class:
            for client, shard in zip(of_class, np.array_split(rows, len(of_class)), strict=True):
                parts[client].append(shard)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def partition_dirichlet(
    labels: IntArray, clients: int, alpha: float, seed: int, min_examples: int = 10
) -> tuple[IntArray, ...]:
    """Divide examples by shares from Dir(alpha, ..., alpha), drawn for each class; every example is used once.

    All shares are drawn again until every client has ``min_examples``.

    Returns:
        Sorted indices into ``labels`` (N,) of each client.

    Raises:
        ConfigError: alpha is not above 0, or a number is below 1.
        DataError: too few examples, or a client had too few in each of `MAX_DRAWS` draws.
    """
    _check_clients(clients)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"`alpha` must be above 0, found {alpha}", remedy="Set `alpha`, for example to 0.5.")
    if min_examples < 1:
        raise ConfigError(f"`min_examples` must be at least 1, found {min_examples}")
    if len(labels) < clients * min_examples:
        raise DataError(
            f"{len(labels)} examples are too few for {clients} clients with at least {min_examples} each",
            remedy="Use fewer clients, or lower `min_examples`.",
        )
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    for _ in range(MAX_DRAWS):
        cuts = _cuts(rng, sizes, clients, alpha)
        if cuts is not None and np.diff(cuts, axis=1).sum(axis=0).min() >= min_examples:
            break
    else:
        raise DataError(
            f"none of {MAX_DRAWS} draws with alpha {alpha} gave all {clients} clients {min_examples} or more examples",
            remedy="Raise `alpha`, use fewer clients, or lower `min_examples`.",
        )
    parts: list[list[IntArray]] = [[] for _ in range(clients)]
    for label, cut in zip(classes, cuts, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for client, part in enumerate(parts):
            part.append(rows[cut[client] : cut[client + 1]])
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def class_counts(labels: IntArray, parts: tuple[IntArray, ...], num_classes: int) -> IntArray:
    """Number of examples per client and class, (clients, classes) int64."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def _cuts(rng: np.random.Generator, sizes: IntArray, clients: int, alpha: float) -> IntArray | None:
    """Where each class is divided, (classes, clients + 1) int64; None if the draw underflowed."""
    shares = rng.dirichlet(np.full(clients, alpha), len(sizes))
    if not np.allclose(shares.sum(axis=1), 1):
        return None
    ends = np.rint(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
    ends[:, -1] = sizes
    return np.concatenate([np.zeros((len(sizes), 1), np.int64), np.minimum(ends, sizes[:, None])], axis=1)


def _check_clients(clients: int) -> None:
    if clients < 1:
        raise ConfigError(f"`clients` must be at least 1, found {clients}", remedy="Set `clients`, for example to 10.")


BY_CLASS, DIRICHLET = "class", "dirichlet"
FORMAT = 1
RECORD, PICTURE = "partition.json", "partition.png"


@dataclasses.dataclass(frozen=True)
class PartitionSettings:
    """How to divide a data set."""

    clients: int
    by: str = BY_CLASS
    """"class" or "dirichlet"."""
    classes_per_client: int = 2
    """Only by class."""
    alpha: float = 0.5
    """Only by Dirichlet."""
    min_examples: int = 10
    """Only by Dirichlet."""
    seed: int = 0
    resized: bool = False
    """Whether images were resized when they were read."""

    def to_dict(self) -> dict[str, Any]:
        """The settings that apply to ``by``; the others do not distinguish partitions."""
        own: dict[str, float] = {"classes_per_client": self.classes_per_client}
        if self.by == DIRICHLET:
            own = {"alpha": self.alpha, "min_examples": self.min_examples}
        return {"clients": self.clients, "by": self.by, **own, "seed": self.seed, "resized": self.resized}

    def divide(self, labels: IntArray) -> tuple[IntArray, ...]:
        """Sorted indices of each client. Raises ConfigError, DataError."""
        if self.by == BY_CLASS:
            return partition_by_class(labels, self.clients, self.classes_per_client, self.seed)
        if self.by == DIRICHLET:
            return partition_dirichlet(labels, self.clients, self.alpha, self.seed, self.min_examples)
        raise ConfigError(f"unknown partition {self.by!r}, must be {BY_CLASS} or {DIRICHLET}")


@dataclasses.dataclass(frozen=True)
class Partition:
    """A partition on disk."""

    folder: Path
    classes: tuple[str, ...]
    counts: IntArray
    """(clients, classes)"""
    files: tuple[str, ...]
    source_sha256: str
    settings: dict[str, Any]
    cached: bool
    """Whether it existed before."""

    def to_dict(self) -> dict[str, Any]:
        """The partition as JSON values."""
        return {
            "out": str(self.folder),
            "settings": self.settings,
            "source_sha256": self.source_sha256,
            "classes": list(self.classes),
            "files": list(self.files),
            "counts": self.counts.tolist(),
            "cached": self.cached,
        }


def write_partition(
    folder: Path, data: ImageSamples | LabelledTexts, settings: PartitionSettings, source_sha256: str
) -> Partition:
    """Divide ``data`` and write the clients' files, the record and the picture to ``folder``.

    An interrupted call can be repeated.

    Raises:
        ConfigError: the folder has another partition, or other files with these names.
        DataError: a named class has no examples, or the data cannot be divided as asked.
        StateCorrupt: a file of the existing partition is missing or was changed.
        StorageError, DiskFull: the disk failed.
    """
    asked = {"format": FORMAT, "source_sha256": source_sha256, "settings": settings.to_dict()}
    before = _read_record(folder)
    if before is not None and {name: before.get(name) for name in asked} != asked:
        raise ConfigError(
            f"{folder} has another partition: {_difference(before, asked)}",
            remedy="Choose another `out`, or delete that folder.",
        )
    if before is not None and before.get("complete"):
        return _cached(folder, before)
    empty = sorted(set(range(len(data.classes))).difference(np.unique(data.labels).tolist()))
    if empty and not _numbered(data.classes):
        raise DataError(
            f"class {data.classes[empty[0]]!r} has no example", remedy="Remove it from the classes, or add examples."
        )
    parts = settings.divide(data.labels)
    counts = class_counts(data.labels, parts, len(data.classes))
    suffix = ".npz" if isinstance(data, ImageSamples) else ".jsonl"
    width = max(2, len(str(len(parts) - 1)))
    names = [f"client-{client:0{width}d}{suffix}" for client in range(len(parts))]
    if before is None:
        taken = [name for name in (*names, PICTURE) if (folder / name).exists()]
        if taken:
            raise ConfigError(
                f"the file {taken[0]} exists in {folder} and is not part of a partition", remedy="Choose another `out`."
            )
    record = {**asked, "classes": list(data.classes), "counts": counts.tolist(), "complete": False}
    make_folder(folder)
    _write_record(folder, record)  # marks these file names as ours, also after an interruption
    files = {}
    for name, part in zip(names, parts, strict=True):
        content = _npz(data, part) if isinstance(data, ImageSamples) else _jsonl(data, part)
        write_durably(folder / name, content)
        files[name] = hashlib.sha256(content).hexdigest()
    with disk_errors(folder / PICTURE):
        save_partition_picture(folder / PICTURE, counts, data.classes, _title(settings))
    _write_record(folder, {**record, "files": files, "complete": True})
    return Partition(folder, data.classes, counts, tuple(names), source_sha256, settings.to_dict(), cached=False)


def source_digest(path: Path) -> str:
    """sha256 of a file, or of the files of an image folder with their relative names. Raises StorageError."""
    if not path.is_dir():
        return hash_file(path)[0]
    digest = hashlib.sha256()
    with disk_errors(f"read {path}"):
        files = sorted(
            file
            for file in path.glob("*/*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{hash_file(file)[0]}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _npz(data: ImageSamples, part: IntArray) -> bytes:
    """Images and labels with all class names, so that labels mean the same on every client."""
    buffer = io.BytesIO()
    np.savez(buffer, images=data.images[part], labels=data.labels[part], classes=np.array(data.classes))
    return buffer.getvalue()


def _jsonl(data: LabelledTexts, part: IntArray) -> bytes:
    numbered = _numbered(data.classes)
    lines = []
    for index in part.tolist():
        label = int(data.labels[index])
        record = {"text": data.texts[index], "label": label if numbered else data.classes[label]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def _numbered(classes: tuple[str, ...]) -> bool:
    """Whether the classes are plain numbers. Then an unused number is not an error: labels may start at 1."""
    return classes == tuple(str(number) for number in range(len(classes)))


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_durably(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode("utf-8"))


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; `out` must be a directory")
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise StateCorrupt(
            f"cannot read {path}: {error}", remedy="Choose another `out`, or delete that folder."
        ) from error
    return record


def _cached(folder: Path, record: dict[str, Any]) -> Partition:
    """The existing partition, with every file verified."""
    try:
        files = dict(record["files"])
        classes = tuple(str(name) for name in record["classes"])
        counts = np.array(record["counts"], np.int64).reshape(len(files), len(classes))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _changed(folder, RECORD) from error
    for name, sha256 in files.items():
        if Path(name).name != name or not (folder / name).is_file() or hash_file(folder / name)[0] != sha256:
            raise _changed(folder, name)
    return Partition(
        folder, classes, counts, tuple(files), record["source_sha256"], dict(record["settings"]), cached=True
    )


def _changed(folder: Path, name: str) -> StateCorrupt:
    return StateCorrupt(
        f"{folder / name} is missing or was changed since the partition was written",
        remedy="Delete the folder, or choose another `out`.",
    )


def _difference(before: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first difference, for a message."""
    if before.get("format") != asked["format"]:
        return f"its format is {before.get('format')!r:.20}, not {asked['format']}"
    old, new = before.get("settings"), asked["settings"]
    if old == new:
        return "its source has different content"
    old = old if isinstance(old, dict) else {}
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r:.20} instead of {new.get(name)!r}" for name in names)


def _title(settings: PartitionSettings) -> str:
    own = f"{settings.classes_per_client} each" if settings.by == BY_CLASS else f"alpha {settings.alpha:g}"
    return f"examples of each class, by {settings.by} ({own}), seed {settings.seed}"
