"""Creates a run: the units of an imported model become blobs, and at the end a database makes them a run.

The importer has the model (and torch); this module gets named raw arrays. Until `RunWriter.finish` has renamed the
database into place, the folder has no run, only blobs that a later import uses or a later start deletes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from edgefed.aggregator.blobs import BlobBatch, BlobStore
from edgefed.aggregator.robust import find_rule
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.store import DATABASE_NAME, LOCK_NAME, Store, has_run, write_database
from edgefed.disk import FolderLock, disk_errors, make_private, read_ranges, sync_folder
from edgefed.errors import CheckpointError, ConfigError
from edgefed.methods.registry import check_ordered
from edgefed.protocol.frames import (
    FLOAT_DTYPES,
    NAME_SEPARATOR,
    FileArray,
    array_bytes,
    encode_header,
    storage_dtype,
)
from edgefed.protocol.messages import UNIT_KINDS, FileInfo, RunConfig, TensorInfo, UnitInfo

logger = logging.getLogger(__name__)

RawTensors = Mapping[str, tuple[str, np.ndarray | FileArray]]
"""{name: (safetensors dtype, raw array)}; BF16 is uint16."""
COPY_THREADS = 2
"""Hashing and writing hold no lock of Python. More threads than cores of a small server gain nothing."""


class RunWriter:
    """Imports a model into a state folder. A context manager; leaving it releases the folder.

    Raises StateLocked if the folder is in use, ConfigError if it already has a run.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        make_private(folder)
        self._lock = FolderLock(folder, LOCK_NAME)
        self._units: dict[str, UnitInfo] = {}
        self._files: dict[str, FileInfo] = {}
        if has_run(folder):
            self._lock.release()
            raise ConfigError(
                f"state folder {folder} holds a run already", remedy="Serve it, or choose another `state`."
            )
        self._blobs = BlobStore(folder)
        self._batch: BlobBatch = self._blobs.batch()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._batch.__exit__(kind, *error)
        finally:
            self._lock.release()

    def add_unit(self, unit: UnitInfo, tensors: RawTensors) -> UnitInfo:
        """Store the tensors of one unit. Returns ``unit`` with their shapes, the hash and the size.

        Raises CheckpointError on a unit that no manifest may contain.
        """
        _check_unit(unit, tensors, self._units)
        infos = tuple(
            TensorInfo(name=name, dtype=dtype, shape=tuple(array.shape)) for name, (dtype, array) in tensors.items()
        )
        self._units[unit.key] = unit  # in the order of the calls
        sha256, size_bytes = self._batch.put(_frame_chunks(infos, tensors))
        stored = msgspec.structs.replace(unit, tensors=infos, sha256=sha256, size_bytes=size_bytes)
        self._units[unit.key] = stored
        return stored

    def add_units(self, units: Iterable[tuple[UnitInfo, RawTensors]]) -> None:
        """Store units, one in memory at a time; those that lie in files are copied side by side. Raises as `add_unit`.

        ``units`` is read in the caller's thread, ahead of the copying threads by at most as many units as there are
        threads.
        """
        with ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="edgefed-copy") as pool:
            copies: deque[Future[UnitInfo]] = deque()
            for unit, tensors in units:
                if all(isinstance(array, FileArray) for _, array in tensors.values()):
                    copies.append(pool.submit(self.add_unit, unit, tensors))
                else:
                    self.add_unit(unit, tensors)
                while len(copies) > 2 * COPY_THREADS:
                    copies.popleft().result()
            for copy in copies:
                copy.result()

    def add_file(self, path: Path) -> FileInfo:
        """Copy a small file (config.json, tokenizer.json, ...) into the run, under its own name."""
        if path.name in self._files:
            raise CheckpointError(f"duplicate file {path.name!r}")
        with disk_errors(f"read {path}"), path.open("rb") as file:
            sha256, size_bytes = self._batch.put(iter(lambda: file.read(1024 * 1024), b""))
        info = FileInfo(name=path.name, sha256=sha256, size_bytes=size_bytes)
        self._files[path.name] = info
        return info

    def finish(self, run: RunConfig, policy: RoundPolicy) -> None:
        """Complete the run. Everything is synced before the database appears under its name."""
        policy.check()
        if policy.rounds != run.rounds:
            raise ConfigError(f"the run has {run.rounds} rounds, its policy says {policy.rounds}")
        experts_per_layer = _experts_per_layer(self._units.values())
        self._batch.flush()
        temporary = self._folder / f"{DATABASE_NAME}.new"
        with disk_errors(f"write {temporary}"):
            temporary.unlink(missing_ok=True)
            write_database(
                temporary, run, policy, tuple(self._units.values()), tuple(self._files.values()), experts_per_layer
            )
            os.replace(temporary, self._folder / DATABASE_NAME)
            sync_folder(self._folder)


def create_run(
    folder: Path,
    run: RunConfig,
    policy: RoundPolicy,
    units: Iterable[tuple[UnitInfo, RawTensors]],
    files: Iterable[Path] = (),
) -> None:
    """Import a model and make it a run, one unit in memory at a time. Raises as `RunWriter` does."""
    with RunWriter(folder) as writer:
        writer.add_units(units)
        for path in files:
            writer.add_file(path)
        writer.finish(run, policy)


def _check_unit(unit: UnitInfo, tensors: RawTensors, known: Mapping[str, UnitInfo]) -> None:
    if unit.key in known:
        raise CheckpointError(f"duplicate key {unit.key!r}")
    if unit.kind not in UNIT_KINDS:
        raise CheckpointError(f"{unit.key!r} has kind {unit.kind!r}, expected one of {', '.join(UNIT_KINDS)}")
    if (unit.kind == "expert") != (unit.expert >= 0) or (unit.kind == "expert" and unit.layer < 0):
        raise CheckpointError(f"{unit.key!r} of kind {unit.kind!r} has layer {unit.layer}, expert {unit.expert}")
    if not tensors:
        raise CheckpointError(f"{unit.key!r} has no tensors")
    for name in (unit.key, *tensors):
        if not name or NAME_SEPARATOR in name:
            raise CheckpointError(f"invalid name of a part or tensor: {name!r} is empty or contains {NAME_SEPARATOR!r}")
    for name, (dtype, array) in tensors.items():
        if isinstance(array, np.ndarray) and array.dtype != storage_dtype(dtype):
            raise CheckpointError(f"tensor {name!r} of {unit.key!r}: {dtype} is not stored as {array.dtype}")
        if unit.trainable and dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} of the trainable {unit.key!r} is {dtype}: only floats can be averaged"
            )


def _frame_chunks(infos: tuple[TensorInfo, ...], tensors: RawTensors) -> Iterator[bytes | memoryview]:
    yield encode_header(infos)
    for _, array in tensors.values():
        if isinstance(array, FileArray):
            yield from read_ranges(array.ranges)
        elif array.size:
            yield array_bytes(array)


def _experts_per_layer(units: Iterable[UnitInfo]) -> tuple[int, ...]:
    """Experts of each MoE layer. Raises CheckpointError if the numbers of layers or experts have gaps."""
    found: dict[int, set[int]] = {}
    for unit in units:
        if unit.kind == "expert":
            found.setdefault(unit.layer, set()).add(unit.expert)
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"the parts name MoE layers {sorted(found)}, expected 0..{len(found) - 1}")
    for layer, experts in found.items():
        if experts != set(range(len(experts))):
            raise CheckpointError(f"layer {layer} has experts {sorted(experts)[:8]}..., expected 0..{len(experts) - 1}")
    return tuple(len(found[layer]) for layer in range(len(found)))


def change_policy(store: Store, changes: Mapping[str, object]) -> RoundPolicy:
    """The policy of a run with ``changes``, which are stored. Raises ConfigError."""
    before = store.policy
    policy = dataclasses.replace(before, **changes)  # type: ignore[arg-type]  # checked next
    policy.check()
    find_rule(policy.robust)
    if policy.adapter_average == "product":
        check_ordered(store.run, policy.max_staleness, policy.download_compression)
    if policy != before:
        store.save_policy(policy)
        for name in changes:
            if (old := getattr(before, name)) != (new := getattr(policy, name)):
                logger.info("policy of the run: %s is now %s, was %s", name, new, old)
    return policy
