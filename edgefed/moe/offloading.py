"""Offloading: weights, gradients and optimizer moments of experts in files or in host memory.

    CPU   memory-mapped files. The operating system writes pages back and drops them. A layer releases its pages as soon
          as it has run, so at most one layer is in memory.
    GPU   host memory, pinned if possible, or files. A slot's weights are copied to the GPU when a kernel needs them,
          gradients are copied back to the host, and the optimizer runs there.

`edgefed.moe.expert_stream` does the same for frozen experts alone, a layer at a time.

Results do not depend on offloading. Files are unlinked as soon as they are open, so nothing remains when the process
ends for any reason. Where the system does not allow that, the next `OffloadSpace` in the folder removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from edgefed.disk import disk_errors, make_folder
from edgefed.errors import first_line

_log = logging.getLogger(__name__)
_ATTRIBUTE = "edgefed_offloaded"
_PREFIX = "experts-"
_MADV_WILLNEED, _MADV_DONTNEED = 3, 4


@dataclasses.dataclass(frozen=True)
class Offloaded:
    """Storage of an offloaded parameter's gradient and moments. None keeps them in host memory.

    ``beside`` are frozen tensors of the same expert that are not needed after its backward pass.
    """

    gradient: torch.Tensor | None = None
    moments: tuple[torch.Tensor, torch.Tensor] | None = None
    beside: tuple[torch.Tensor, ...] = ()


class OffloadSpace:
    """Storage for the offloaded experts of a model on ``device``: files in ``folder``, or host memory if it is None.

    ``copies`` says whether kernels get copies of the weights; None means yes unless ``device`` is the CPU. Raises
    StorageError, DiskFull.
    """

    def __init__(self, device: torch.device, folder: Path | None, copies: bool | None = None):
        self.device = device
        self.copies = device.type != "cpu" if copies is None else copies
        self._folder = None if folder is None else make_folder(folder)
        if folder is not None:
            with disk_errors(folder):
                for leftover in folder.glob(f"{_PREFIX}*"):
                    leftover.unlink(missing_ok=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor. Raises DiskFull, before anything is written, if the disk is full."""
        if self._folder is None:
            return _host_tensor(shape, dtype)
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        with disk_errors(self._folder):
            handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=self._folder)
            try:
                _reserve(handle, numel * dtype.itemsize)
                tensor = torch.from_file(name, shared=True, size=numel, dtype=dtype)
            finally:
                os.close(handle)
                with contextlib.suppress(PermissionError):  # Windows cannot remove a mapped file
                    os.unlink(name)
        return tensor.view(shape)

    def gradients_and_moments(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return storage for a gradient and two moments of ``shape``; None if they stay in host memory."""
        if self._folder is None:
            return None
        return self.empty(shape, dtype), self.empty(shape, dtype), self.empty(shape, dtype)

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` where kernels can use it. Gradients flow back through the copy."""
        if not self.copies:
            return tensor
        copy = tensor.to(self.device, non_blocking=True, copy=True)
        release((tensor,))
        return copy


def mark_offloaded(parameter: torch.Tensor, offloaded: Offloaded) -> None:
    """Mark ``parameter`` as offloaded. Its gradient moves to the storage in ``offloaded`` as soon as it is computed."""
    setattr(parameter, _ATTRIBUTE, offloaded)
    if parameter.requires_grad and offloaded.gradient is not None:
        parameter.register_post_accumulate_grad_hook(_offload_gradient)  # type: ignore[no-untyped-call]


def offloaded(tensor: torch.Tensor) -> Offloaded | None:
    """Return what `mark_offloaded` stored for ``tensor``; None for a tensor that is not offloaded."""
    found: Offloaded | None = getattr(tensor, _ATTRIBUTE, None)
    return found


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Release the memory of mapped ``tensors``. Their values stay in the files and are read again when needed.

    Other tensors do not change.
    """
    _advise(tensors, _MADV_DONTNEED)


def prefetch(tensors: Iterable[torch.Tensor]) -> None:
    """Let the system read the files of mapped ``tensors`` into its page cache. Returns when the reads have begun."""
    _advise(tensors, _MADV_WILLNEED)


def _advise(tensors: Iterable[torch.Tensor], advice: int) -> None:
    if sys.platform != "linux":
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None:
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            _libc().madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(tensor.data_ptr() + tensor.numel() * tensor.element_size() - start),
                advice,
            )


def _offload_gradient(parameter: nn.Parameter) -> None:
    """Move the gradient to its offload file and release the weight pages."""
    place = offloaded(parameter)
    if place is None or place.gradient is None or parameter.grad is None:
        return
    if parameter.grad.data_ptr() != place.gradient.data_ptr():
        place.gradient.copy_(parameter.grad)
        parameter.grad = place.gradient
    release((place.gradient, parameter, *place.beside))


def _reserve(handle: int, size: int) -> None:
    """Allocate ``size`` bytes of disk for an empty file. Writing to a hole on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    zeros = bytes(1 << 20)
    for begin in range(0, size, len(zeros)):
        os.write(handle, zeros[: size - begin])


def _host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if torch.cuda.is_available():
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:  # refused by the driver or by a system limit
            _warn_unpinned(first_line(error))
    return torch.empty(shape, dtype=dtype)


@functools.lru_cache(maxsize=1)
def _warn_unpinned(reason: str) -> None:
    _log.warning("offloaded experts are in memory that is not pinned, so copies are slower: %s", reason)


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
