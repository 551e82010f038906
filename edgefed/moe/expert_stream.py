"""Frozen experts that do not fit in memory: one layer is loaded while the one before it computes.

    CPU   memory-mapped files, in the format in which experts are stored. A thread asks the system to read the next
          layer's pages (madvise); those of every other layer leave the process.
    GPU   pinned host memory, or files. Two buffers on the GPU take turns: while one layer computes, the next one's
          weights are copied into the other buffer on a CUDA stream of its own.

The forward pass uses the layers in ascending order, the backward pass in descending order. A layer has the same
addresses whenever it is loaded, so that what autograd saves in the forward pass is valid in the backward pass. Results
do not depend on streaming.

Resident memory: the pages of one layer on a CPU, two buffers on a GPU. Clean pages in the system's page cache are no
memory of the process: the system drops them when it needs room.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch

from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.moe.offloading import Offloaded, OffloadSpace, mark_offloaded, prefetch, release


class ExpertStream:
    """The frozen experts of a model, in ``space``. Layers are MoE layers by ordinal, counted from 0."""

    def __init__(self, space: OffloadSpace):
        self._space = space
        self._layers: dict[int, list[torch.Tensor]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """Layer and number of a tensor, by the address of its storage."""
        self._used: set[int] = set()
        """Layers that may have mapped pages."""
        self._buffers = _Buffers(space.device) if space.copies else None

    def empty(self, layer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor of a layer, in files or host memory. Raises DiskFull, StorageError."""
        tensor = self._space.empty(shape, dtype)
        if not tensor.numel():
            return tensor
        tensors = self._layers.setdefault(layer, [])
        self._places[tensor.untyped_storage().data_ptr()] = layer, len(tensors)
        self._used.add(layer)
        tensors.append(tensor)
        mark_offloaded(tensor, Offloaded())
        return tensor

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` where kernels can use it: a view of a buffer for a tensor of this stream, else itself.

        The view has the values of the tensor from `enter` of its layer to that of another.
        """
        if self._buffers is None:
            return tensor
        layer, index = self._places.get(tensor.untyped_storage().data_ptr(), (-1, -1))
        if layer < 0:
            return tensor
        copy = self._buffers.copy_of(layer, index, self._layers[layer][index])
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def near_matrix(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        """Return a quantized matrix, as `near` does."""
        absmax = None if matrix.absmax is None else self.near(matrix.absmax)
        return dataclasses.replace(matrix, packed=self.near(matrix.packed), absmax=absmax)

    def enter(self, layer: int, *, backward: bool) -> None:
        """Load the experts of ``layer``, which kernels use next, and begin to load those of the layer after it."""
        after = layer - 1 if backward else layer + 1
        if self._buffers is not None:
            self._buffers.load(layer, self._layers.get(layer, ()))
            self._buffers.load(after, self._layers.get(after, ()), ahead=True)
            return
        self._used.discard(layer)
        self.release()
        self._used = {layer} & self._layers.keys()
        if after in self._layers:
            threading.Thread(target=prefetch, args=(self._layers[after],), name="edgefed-prefetch", daemon=True).start()

    def release(self) -> None:
        """Release the mapped pages of every layer.

        They are released again when the next layer is entered: behind a layer that checkpointing has computed again,
        its backward pass still reads them.
        """
        for layer in self._used:
            release(self._layers[layer])


class _Buffers:
    """Copies of two layers on ``device``: those with an even and those with an odd number share a buffer each."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copies: dict[tuple[int, int, torch.Size, torch.dtype], torch.Tensor] = {}
        self._layers: dict[int, int] = {}
        self._events: dict[int, torch.cuda.Event] = {}

    def copy_of(self, layer: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return the place for the tensor with number ``index`` of a layer; its values depend on what was loaded."""
        key = layer % 2, index, tensor.shape, tensor.dtype
        if key not in self._copies:
            self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        return self._copies[key]

    def load(self, layer: int, tensors: Sequence[torch.Tensor], *, ahead: bool = False) -> None:
        """Copy a layer into its buffer if it is not there. Unless ``ahead``, kernels launched from now on wait for it.

        The copy waits for the kernels launched so far, which may use the layer that is there now.
        """
        if not tensors:
            return
        buffer = layer % 2
        if self._layers.get(buffer) != layer:
            # .data has its own version counter: for autograd, what it saved of another layer here does not change.
            pairs = [(self.copy_of(layer, index, tensor).data, tensor) for index, tensor in enumerate(tensors)]
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for copy, tensor in pairs:
                    copy.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                self._events[buffer] = self._stream.record_event()
            release(tensors)
            self._layers[buffer] = layer
        if not ahead and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._events[buffer])
