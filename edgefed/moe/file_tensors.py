"""Tensors that stay in files until their values are needed.

A `FileTensor` has the address of each of its rows instead of values. An operation that only moves rows (stack, cat,
chunk, select, ...) moves addresses; any other operation reads the values and goes on with an ordinary tensor. So the
conversions of transformers run unchanged, and a tensor that they only rearrange is copied from file to file, without
being in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgefed.disk import FileRange, read_ranges
from edgefed.errors import CheckpointError, StorageError

MIN_ROW_BYTES = 64
"""A tensor with shorter rows is read at once: addresses take 8 bytes a row."""
_OFFSET_BITS = 48

_aten: Any = torch.ops.aten
_DIM_ARGUMENT: dict[Any, int] = {
    _aten.stack.default: 1, _aten.cat.default: 1, _aten.select.int: 1, _aten.slice.Tensor: 1, _aten.split.Tensor: 2,
    _aten.split_with_sizes.default: 2, _aten.unbind.int: 1, _aten.squeeze.dim: 1, _aten.unsqueeze.default: 1,
}  # fmt: skip
"""Operations that move rows unless they work on the last dimension, and the place of ``dim`` in their arguments."""
_ADDS_DIMENSION = (_aten.stack.default, _aten.unsqueeze.default)


class FileSpace:
    """Makes `FileTensor`s of the files of one checkpoint or run; tensors of different spaces are never joined."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._numbers: dict[Path, int] = {}

    def tensor(self, path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Return the tensor at byte ``start`` of a file, in C order; one with short rows or no values as usual.

        Raises CheckpointError if it has to read and cannot.
        """
        number = self._numbers.setdefault(path, len(self._paths))
        if number == len(self._paths):
            self._paths.append(path)
        *leading, columns = shape or (1,)
        row_bytes = columns * dtype.itemsize
        count = int(np.prod(leading, dtype=np.int64))
        rows = (number << _OFFSET_BITS) + start + row_bytes * torch.arange(count).reshape(leading)
        found = FileTensor(self, rows, columns, dtype)
        return found if row_bytes >= MIN_ROW_BYTES and count else found.in_memory().reshape(tuple(shape))

    def ranges(self, rows: torch.Tensor, row_bytes: int) -> list[FileRange]:
        """Return where rows are, those that are next to each other together."""
        starts = rows.reshape(-1).numpy()
        breaks = np.flatnonzero(np.diff(starts) != row_bytes) + 1
        found = []
        for first, end in zip([0, *breaks], [*breaks, len(starts)], strict=True):
            number, start = divmod(int(starts[first]), 1 << _OFFSET_BITS)
            found.append(FileRange(self._paths[number], start, int(end - first) * row_bytes))
        return found


class FileTensor(torch.Tensor):
    """A tensor (..., C) by the addresses (...) int64 of its rows. Read-only; made by `FileSpace.tensor`."""

    space: FileSpace
    rows: torch.Tensor
    loaded: torch.Tensor | None

    @staticmethod
    def __new__(cls, space: FileSpace, rows: torch.Tensor, columns: int, dtype: torch.dtype) -> FileTensor:
        """Make a tensor without storage."""
        make: Any = torch.Tensor._make_wrapper_subclass
        found: FileTensor = make(cls, (*rows.shape, columns), dtype=dtype, device="cpu", requires_grad=False)
        found.space, found.rows = space, rows
        found.loaded = None
        return found

    @property
    def ranges(self) -> list[FileRange]:
        """Where the bytes of the tensor are, in C order."""
        return self.space.ranges(self.rows, self.shape[-1] * self.dtype.itemsize)

    def in_memory(self) -> torch.Tensor:
        """Return the tensor in memory; the first call reads it. Raises CheckpointError."""
        if self.loaded is None:
            values = torch.empty(self.shape, dtype=self.dtype)
            if values.numel():
                target = memoryview(values.reshape(-1).view(torch.uint8).numpy().data)
                try:
                    for chunk in read_ranges(self.ranges):
                        target[: len(chunk)] = chunk
                        target = target[len(chunk) :]
                except StorageError as error:
                    raise CheckpointError(str(error)) from error
            self.loaded = values
        return self.loaded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own signature is that of a disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on addresses if it only moves rows, otherwise on values."""
        options = dict(kwargs or {})
        if func in (_aten.detach.default, _aten.alias.default):
            return _like(args[0], args[0].rows)
        if func in _DIM_ARGUMENT:
            place = _DIM_ARGUMENT[func]
            is_list = isinstance(args[0], (list, tuple))
            tensors = args[0] if is_list else args[:1]
            dim = args[place] if len(args) > place else options.get("dim", 0)
            num_dims = tensors[0].ndim + (func in _ADDS_DIMENSION)
            dim = dim + num_dims if dim < 0 else dim
            if dim < num_dims - 1 and _joinable(tensors):
                rows = [tensor.rows for tensor in tensors]
                rest = args[1:place], (dim,), args[place + 1 :]
                moved = func(rows if is_list else rows[0], *itertools.chain(*rest))
                if isinstance(moved, torch.Tensor):
                    return _like(tensors[0], moved)
                return [_like(tensors[0], each) for each in moved]
        return func(*_in_memory(args), **{name: _in_memory(value) for name, value in options.items()})


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in memory. Raises CheckpointError if it cannot be read."""
    return tensor.in_memory() if isinstance(tensor, FileTensor) else tensor


def _like(tensor: FileTensor, rows: torch.Tensor) -> FileTensor:
    return FileTensor(tensor.space, rows, tensor.shape[-1], tensor.dtype)


def _joinable(tensors: Sequence[Any]) -> bool:
    """Whether all are in the files of one space, with rows of one kind."""
    kinds = {(t.space, t.shape[-1], t.dtype) if isinstance(t, FileTensor) else None for t in tensors}
    return len(kinds) == 1 and None not in kinds


def _in_memory(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_in_memory(each) for each in value]
    return value_of(value) if isinstance(value, torch.Tensor) else value
