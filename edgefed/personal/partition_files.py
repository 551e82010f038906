"""Partitions on the disk: a file per client, what was divided how, and a picture of it.

    DIR/client-00.npz ...   images and labels with all class names (or client-00.jsonl of labelled texts)
    DIR/partition.json      settings, sha256 of the source and of each file, counts per client and class
    DIR/partition.png       the counts as bubbles

The same source and settings are not written again; other ones in the same folder are refused.
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
from edgefed.personal.batches import ImageSamples
from edgefed.personal.labelled_text import LabelledTexts
from edgefed.personal.partition import class_counts, partition_by_class, partition_dirichlet
from edgefed.plots import save_partition_picture

BY_CLASS, DIRICHLET = "class", "dirichlet"
FORMAT = 1
RECORD, PICTURE = "partition.json", "partition.png"


@dataclasses.dataclass(frozen=True)
class PartitionSettings:
    """How to divide. ``classes_per_client`` is for "class"; ``alpha`` and ``min_examples`` are for "dirichlet";
    ``resized``: the images were scaled when they were read.
    """

    clients: int
    by: str = BY_CLASS
    classes_per_client: int = 2
    alpha: float = 0.5
    min_examples: int = 10
    seed: int = 0
    resized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Only what matters for ``by``: what does not matter does not make another partition."""
        own = {"classes_per_client": self.classes_per_client}
        if self.by == DIRICHLET:
            own = {"alpha": self.alpha, "min_examples": self.min_examples}
        return {"clients": self.clients, "by": self.by, **own, "seed": self.seed, "resized": self.resized}

    def divide(self, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Sorted indices of each client. Raises ConfigError, DataError."""
        if self.by == BY_CLASS:
            return partition_by_class(labels, self.clients, self.classes_per_client, self.seed)
        if self.by == DIRICHLET:
            return partition_dirichlet(labels, self.clients, self.alpha, self.seed, self.min_examples)
        raise ConfigError(f"there is no partition by {self.by!r}; there are {BY_CLASS} and {DIRICHLET}")


@dataclasses.dataclass(frozen=True)
class Partition:
    """What lies in ``folder``. ``counts`` (clients, classes); ``cached``: it was there before."""

    folder: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    files: tuple[str, ...]
    source_sha256: str
    settings: dict[str, Any]
    cached: bool

    def to_dict(self) -> dict[str, Any]:
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
    """Divide ``data`` and write the clients' files, record and picture to ``folder``.

    Interrupted, it goes on when called again. Raises:
        ConfigError: the folder holds another partition, or files of these names that no partition wrote.
        DataError: a named class without examples; it cannot be divided so.
        StateCorrupt: a file of the partition is missing or was changed since.
        StorageError, DiskFull: the disk.
    """
    asked = {"format": FORMAT, "source_sha256": source_sha256, "settings": settings.to_dict()}
    before = _read_record(folder)
    if before is not None and {name: before.get(name) for name in asked} != asked:
        raise ConfigError(
            f"{folder} holds another partition: {_difference(before, asked)}",
            remedy="Choose another `out`, or delete that folder.",
        )
    if before is not None and before.get("complete"):
        return _cached(folder, before)
    empty = sorted(set(range(len(data.classes))).difference(np.unique(data.labels).tolist()))
    if empty and not _numbered(data.classes):
        raise DataError(
            f"class {data.classes[empty[0]]!r} has no example", remedy="Leave it out of the classes, or add examples."
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
                f"{folder} has a file {taken[0]} that no partition of edgefed wrote", remedy="Choose another `out`."
            )
    record = {**asked, "classes": list(data.classes), "counts": counts.tolist(), "complete": False}
    make_folder(folder)
    _write_record(folder, record)  # from here on these names are ours, also after an interruption
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
    """sha256 of a file, or of a folder's image files with their names below it. Raises StorageError."""
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


def _npz(data: ImageSamples, part: np.ndarray) -> bytes:
    """Class names go along: a client's numbers mean the same as another's."""
    buffer = io.BytesIO()
    np.savez(buffer, images=data.images[part], labels=data.labels[part], classes=np.array(data.classes))
    return buffer.getvalue()


def _jsonl(data: LabelledTexts, part: np.ndarray) -> bytes:
    numbered = _numbered(data.classes)
    lines = []
    for index in part.tolist():
        label = int(data.labels[index])
        record = {"text": data.texts[index], "label": label if numbered else data.classes[label]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def _numbered(classes: tuple[str, ...]) -> bool:
    """Whether classes are only numbered. Then a number that nobody uses is no class: labels may begin at 1."""
    return classes == tuple(str(number) for number in range(len(classes)))


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_durably(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode("utf-8"))


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, and `out` needs a folder")
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise StateCorrupt(
            f"cannot read {path}: {error}", remedy="Choose another `out`, or delete that folder."
        ) from error
    return record


def _cached(folder: Path, record: dict[str, Any]) -> Partition:
    """The partition that is there, after a look at every file."""
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
        f"{folder / name} is not what the partition wrote", remedy="Delete the folder, or choose another `out`."
    )


def _difference(before: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first thing that differs, for people."""
    if before.get("format") != asked["format"]:
        return f"its format is {before.get('format')!r:.20}, not {asked['format']}"
    old, new = before.get("settings"), asked["settings"]
    if old == new:
        return "its source has other content"
    old = old if isinstance(old, dict) else {}
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r:.20} instead of {new.get(name)!r}" for name in names)


def _title(settings: PartitionSettings) -> str:
    own = f"{settings.classes_per_client} each" if settings.by == BY_CLASS else f"alpha {settings.alpha:g}"
    return f"examples of each class, by {settings.by} ({own}), seed {settings.seed}"
