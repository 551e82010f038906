"""Experts away from their processor: weights, gradients and optimizer moments lie in files or in host memory.

    CPU   files, mapped into memory: the kernel writes pages back and drops them; a layer that is done gives its own
          pages up at once, so that the process never holds more than one layer
    GPU   host memory (pinned where that can be had), or files: a slot's weights are copied to the GPU when its kernels
          ask for them, gradients flow back to the host, and the optimizer runs there

Nothing of the result depends on it. Files have no name from the moment they exist, so nothing is left of them whatever
ends the process; where a system cannot do that, the next `OffloadSpace` on the folder removes them.
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

_log = logging.getLogger(__name__)
_ATTRIBUTE = "edgefed_offloaded"
_PREFIX = "experts-"
_MADV_DONTNEED = 4


@dataclasses.dataclass(frozen=True)
class Offloaded:
    """Where an offloaded parameter's gradient and moments go: None, and they stay beside it in host memory.

    ``beside``: frozen tensors of the same expert, that its backward pass needs and nobody after it.
    """

    gradient: torch.Tensor | None = None
    moments: tuple[torch.Tensor, torch.Tensor] | None = None
    beside: tuple[torch.Tensor, ...] = ()


class OffloadSpace:
    """Room for the experts of a model that computes on ``device``: files in ``folder``, or host memory without one.

    ``copies``: kernels get copies; None: where ``device`` is no CPU. Raises StorageError, DiskFull.
    """

    def __init__(self, device: torch.device, folder: Path | None, copies: bool | None = None):
        self._device = device
        self._folder = None if folder is None else make_folder(folder)
        self._copies = device.type != "cpu" if copies is None else copies
        if folder is not None:
            with disk_errors(folder):
                for left in folder.glob(f"{_PREFIX}*"):
                    left.unlink(missing_ok=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of no defined value. Raises DiskFull before anything is written where the disk has no room."""
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
                with contextlib.suppress(PermissionError):  # Windows: not while it is mapped
                    os.unlink(name)
        return tensor.view(shape)

    def gradients_and_moments(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Room for what training adds to parameters of ``shape``; None where it is host memory anyway."""
        return None if self._folder is None else tuple(self.empty(shape, dtype) for _ in range(3))

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` where kernels can use it; gradients flow back through it."""
        if not self._copies:
            return tensor
        copy = tensor.to(self._device, non_blocking=True, copy=True)
        release((tensor,))
        return copy


def mark_offloaded(parameter: nn.Parameter, offloaded: Offloaded) -> None:
    """Make ``parameter`` one of an OffloadSpace: as soon as its gradient is there, it goes where ``offloaded`` says."""
    setattr(parameter, _ATTRIBUTE, offloaded)
    if parameter.requires_grad and offloaded.gradient is not None:
        parameter.register_post_accumulate_grad_hook(_put_away)


def offloaded(tensor: torch.Tensor) -> Offloaded | None:
    """What `mark_offloaded` was told of ``tensor``; None for any other."""
    return getattr(tensor, _ATTRIBUTE, None)


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Give up the memory of mapped ``tensors``: their values stay in the files, and come back when they are read.

    Others stay as they are.
    """
    if sys.platform != "linux":
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None:
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            _libc().madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(tensor.data_ptr() + tensor.numel() * tensor.element_size() - start),
                _MADV_DONTNEED,
            )


def _put_away(parameter: nn.Parameter) -> None:
    """The gradient that was just made goes into its file. The weights were needed for it, and are not any more."""
    place = offloaded(parameter)
    if parameter.grad.data_ptr() != place.gradient.data_ptr():
        place.gradient.copy_(parameter.grad)
        parameter.grad = place.gradient
    release((place.gradient, parameter, *place.beside))


def _reserve(handle: int, size: int) -> None:
    """Give an empty file ``size`` bytes of disk: a hole that finds no room later would kill the process."""
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
        except RuntimeError as error:  # the driver or a limit of the system
            _tell_unpinned(str(error).strip().splitlines()[0])
    return torch.empty(shape, dtype=dtype)


@functools.lru_cache(maxsize=1)
def _tell_unpinned(reason: str) -> None:
    _log.warning("offloaded experts lie in memory that is not pinned, copies are slower: %s", reason)


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
