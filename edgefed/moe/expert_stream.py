"""Frozen experts that do not fit in memory: one layer is loaded while the one before it computes.

    CPU   memory-mapped files, in the format in which experts are stored. A thread asks the system to read the next
          layer's pages (madvise); those of every other layer leave the process.
    GPU   pinned host memory, or files. Two buffers on the GPU take turns: while one layer computes, the next one's
          weights are copied into the other buffer on a CUDA stream of its own. Each pass begins with the two layers
          that the last one ended with: they are still there.

Any of a model's layers can be streamed; the others are in memory. The forward pass uses them in ascending order, the
backward pass in descending order. A layer has the same addresses whenever it is loaded, so that what autograd saves in
the forward pass is valid in the backward pass. Results do not depend on streaming.

Resident memory: the pages of one layer on a CPU, two buffers on a GPU, each of the largest layer that uses it. Clean
pages in the system's page cache are no memory of the process: the system drops them when it needs room.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Mapping, Sequence

import torch

from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.moe.offloading import Offloaded, OffloadSpace, mark_offloaded, prefetch, release

ALIGNMENT = 256
"""Bytes. Kernels read in vectors; CUDA aligns what it allocates to this."""


class ExpertStream:
    """The frozen experts of ``layers``, in ``space``. Layers are MoE layers by ordinal, from 0; None: all of them."""

    def __init__(self, space: OffloadSpace, layers: Collection[int] | None = None):
        self._space = space
        self._streamed = None if layers is None else frozenset(layers)
        self._layers: dict[int, list[torch.Tensor]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """Layer and number of a tensor, by the address of its storage."""
        self._used: set[int] = set()
        """Layers that may have mapped pages."""
        self._buffers = _Buffers(space.device) if space.copies else None

    def streams(self, layer: int) -> bool:
        """Whether the frozen experts of ``layer`` are streamed."""
        return self._streamed is None or layer in self._streamed

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
        copy = self._buffers.copies(self._layers, layer)[index]
        return copy.as_strided(tensor.shape, tensor.stride(), copy.storage_offset() + tensor.storage_offset())

    def near_matrix(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        """Return a quantized matrix, as `near` does."""
        absmax = None if matrix.absmax is None else self.near(matrix.absmax)
        return dataclasses.replace(matrix, packed=self.near(matrix.packed), absmax=absmax)

    def enter(self, layer: int, *, backward: bool) -> None:
        """Load the experts of ``layer``, which kernels use next, and begin to load those of the next streamed layer."""
        if layer not in self._layers:
            return
        order = [*sorted(self._layers, reverse=backward), None]
        after = order[order.index(layer) + 1]
        if self._buffers is not None:
            self._buffers.load(self._layers, layer)
            if after is not None:
                self._buffers.load(self._layers, after, ahead=True)
            return
        self._used.discard(layer)
        self.release()
        self._used = {layer}
        if after is not None:
            threading.Thread(target=prefetch, args=(self._layers[after],), name="edgefed-prefetch", daemon=True).start()

    def release(self) -> None:
        """Release the mapped pages of every layer.

        They are released again when the next layer is entered: behind a layer that checkpointing has computed again,
        its backward pass still reads them.
        """
        for layer in self._used:
            release(self._layers[layer])


class _Buffers:
    """Copies of two layers on ``device``. Streamed layers take turns: the first, third, ... share one buffer."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copies: dict[int, list[torch.Tensor]] = {}
        self._loaded: dict[int, int] = {}
        """Layer in each buffer."""
        self._events: dict[int, torch.cuda.Event] = {}

    def copies(self, layers: _Layers, layer: int) -> list[torch.Tensor]:
        """Return the places for the tensors of ``layer``; their values depend on what was loaded."""
        if not self._copies:
            for first in range(2):
                self._divide({each: layers[each] for each in sorted(layers)[first::2]})
        return self._copies[layer]

    def _divide(self, layers: _Layers) -> None:
        """Divide one buffer among the tensors of each of ``layers``."""
        sizes = {layer: [_aligned(tensor.nbytes) for tensor in tensors] for layer, tensors in layers.items()}
        most = max(map(sum, sizes.values()), default=0)
        buffer = torch.empty(most, dtype=torch.uint8, device=self._device)
        for layer, tensors in layers.items():
            parts = torch.split(buffer[: sum(sizes[layer])], sizes[layer])
            self._copies[layer] = [
                part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                for part, tensor in zip(parts, tensors, strict=True)
            ]

    def load(self, layers: _Layers, layer: int, *, ahead: bool = False) -> None:
        """Copy a layer into its buffer if it is not there. Unless ``ahead``, kernels launched from now on wait for it.

        The copy waits for the kernels launched so far, which may use the layer that is there now.
        """
        buffer = sorted(layers).index(layer) % 2
        if self._loaded.get(buffer) != layer:
            # .data has its own version counter: for autograd, what it saved of another layer here does not change.
            copies = [copy.data for copy in self.copies(layers, layer)]
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for copy, tensor in zip(copies, layers[layer], strict=True):
                    copy.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                self._events[buffer] = self._stream.record_event()
            release(layers[layer])
            self._loaded[buffer] = layer
        if not ahead and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._events[buffer])


class StagedCopies:
    """Copies to ``device`` by way of two pinned buffers that take turns: one is filled while the other is copied.

    The copies are in the order of the current CUDA stream; only the calling thread waits, for a buffer to be free. Each
    buffer has the size of the largest tensor so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._space = OffloadSpace(device, None)
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]

    def __call__(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Copy ``value``, on the CPU, into ``target``, on the device."""
        size = value.numel() * value.element_size()
        buffer, event = self._buffers.pop(0), self._events.pop(0)
        if event is not None:
            event.synchronize()
        if len(buffer) < size:
            buffer = self._space.empty((size,), torch.uint8)
        host = buffer[:size].view(value.dtype).view(value.shape)
        host.copy_(value)
        target.copy_(host, non_blocking=True)
        self._buffers.append(buffer)
        is_gpu = self._device.type == "cuda"
        self._events.append(torch.cuda.current_stream(self._device).record_event() if is_gpu else None)


_Layers = Mapping[int, Sequence[torch.Tensor]]


def _aligned(size: int) -> int:
    """``size`` rounded up to what CUDA aligns allocations to."""
    return -(-size // ALIGNMENT) * ALIGNMENT
