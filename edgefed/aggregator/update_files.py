"""The files of updates: where each tensor is, and reading blocks of many files with few of them open."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.slices import read_rows, upload_tensors
from edgefed.aggregator.validate import read_exactly
from edgefed.disk import disk_errors
from edgefed.protocol.frames import read_header, update_name
from edgefed.protocol.messages import NEURON_INDEX, UnitInfo
from edgefed.protocol.slices import are_rows, neuron_table

MAX_OPEN_FILES = 64
"""Open files per thread: a round may have more clients than a process can open files."""
_ABSENT = -1


class UpdateDamaged(Exception):
    """The file of an accepted update changed while it was read. Never leaves the server."""

    def __init__(self, client_id: str, path: Path):
        super().__init__(f"its file {path.name} changed while it was aggregated")
        self.client_id = client_id


class UpdateIndex:
    """Position of each tensor in each update file, in 8 bytes per tensor and client; headers take many more."""

    def __init__(self, units: Sequence[UnitInfo], updates: Mapping[str, Path]):
        """Read the header of each file in ``updates`` {client_id: path}."""
        names = [update_name(unit.key, info.name) for unit in units if unit.trainable for info in upload_tensors(unit)]
        self._order = {name: at for at, name in enumerate(names)}
        self._paths = dict(updates)
        self._starts = {}
        self._widths: dict[str, np.ndarray] = {}
        sliced = any(neuron_table(unit) for unit in units)
        for client_id, path in updates.items():
            starts = np.full(len(names), _ABSENT, dtype=np.int64)
            widths = np.zeros(len(names) if sliced else 0, dtype=np.int32)
            for name, entry in read_header(path).items():
                starts[self._order[name]] = entry.start
                if sliced and entry.info.shape:
                    widths[self._order[name]] = entry.info.shape[0]
            self._starts[client_id], self._widths[client_id] = starts, widths

    def has(self, client_id: str, unit: UnitInfo) -> bool:
        """Whether a client uploaded a unit."""
        return bool(self._starts[client_id][self._order[update_name(unit.key, unit.tensors[0].name)]] != _ABSENT)

    def locate(self, client_id: str, unit_key: str, name: str) -> tuple[Path, int]:
        """File and first byte of a tensor. Raises ValueError if the client did not upload it: the plan is wrong."""
        at = self._order.get(update_name(unit_key, name))
        start = int(self._starts[client_id][at]) if at is not None and client_id in self._starts else _ABSENT
        if start == _ABSENT:
            raise ValueError(f"the merge plan needs {unit_key!r} of client {client_id!r}, which did not upload it")
        return self._paths[client_id], start

    def rows(self, client_id: str, unit_key: str, num_rows: int) -> np.ndarray:
        """Rows of a table of ``num_rows`` neurons that a client uploaded, (W,). Raises ValueError, UpdateDamaged."""
        path, start = self.locate(client_id, unit_key, NEURON_INDEX)
        width = int(self._widths[client_id][self._order[update_name(unit_key, NEURON_INDEX)]])
        rows = read_rows(path, start, width)
        if len(rows) != width or not are_rows(rows, num_rows):
            raise UpdateDamaged(client_id, path)
        return rows


class BlockFiles:
    """Open files of one tensor, at most `MAX_OPEN_FILES`."""

    def __init__(self) -> None:
        self._open: dict[Path, io.FileIO] = {}

    def __enter__(self) -> BlockFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, path: Path, start: int, buffer: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
        """Read ``length`` elements at byte ``start`` into ``buffer`` and return them as ``dtype``."""
        with disk_errors(f"read {path}"):
            file = self._open.get(path)
            if file is None:
                for oldest in list(itertools.islice(self._open, max(0, len(self._open) - MAX_OPEN_FILES + 1))):
                    self._open.pop(oldest).close()
                file = self._open[path] = io.FileIO(path)
            raw = buffer[: length * dtype.itemsize]
            file.seek(start)
            read_exactly(file, raw)
        return raw.view(dtype)
