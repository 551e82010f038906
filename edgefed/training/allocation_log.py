"""What a memory allocator held between marks: from CUDA's own counters, or from the CPU profiler's events."""

from __future__ import annotations

import dataclasses
import os
import time
from types import TracebackType
from typing import Any, Protocol

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope
from torch.autograd.profiler import profile, record_function

from edgefed.hardware.memory import reset_peak_rss, status_bytes, trim_memory

_PREFIX = "edgefed:"
PART_S = 0.25
"""Events of at least so many seconds are read at a time: reading takes 0.07 s."""
OPTIMIZER_MARK = "optimizer"
"""The mark within ``Optimizer.step``."""
_CPU = torch._C._autograd.DeviceType.CPU


@dataclasses.dataclass(frozen=True)
class Span:
    """From one mark to the next: bytes held at its start, and the most held in it."""

    name: str
    start_bytes: int
    peak_bytes: int


class AllocationLog(Protocol):
    """Records an allocator while it is open as a context."""

    before_bytes: int
    """Bytes that the allocator held before; 0 if it does not say."""
    high_water_bytes: int | None
    """Most resident memory of the process while nothing was read; None if unknown, or another device's."""

    def __enter__(self) -> AllocationLog:
        """Start recording."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop recording."""

    def mark(self, name: str) -> None:
        """Begin a span."""

    def spans(self) -> list[Span]:
        """All spans but the last, in order; their bytes do not include ``before_bytes``."""


class CpuLog:
    """The CPU allocator's events, from the profiler.

    The profiler records marks and memory, but no operations: these took 25 KiB each when they were read, more than a
    gigabyte for a step with adapters on 600 experts. Memory events take 1.8 KiB each when they are read, so they
    are read in parts: at a mark outside the backward pass, whose thread state the profiler belongs to, and outside
    ``Optimizer.step``, which torch records as a range. When a range ends after its profiler, torch writes the time into
    freed memory, which may be a weight by then.
    """

    before_bytes = 0

    def __init__(self) -> None:
        self.high_water_bytes: int | None = None
        self._settings: Any = profile(use_kineto=True, profile_memory=True)
        self._spans: list[Span] = []
        self._held = 0
        self._current: Span | None = None
        self._started = 0.0

    def __enter__(self) -> CpuLog:
        config, activities = self._settings.config(), self._settings.kineto_activities
        level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = "99"  # else it writes two lines to stderr; read when the first profiler starts
        try:
            _prepare_profiler(config, activities)
            _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
        finally:
            del os.environ["KINETO_LOG_LEVEL"]
            if level is not None:
                os.environ["KINETO_LOG_LEVEL"] = level
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop recording."""
        if high_water := status_bytes("VmHWM"):
            self.high_water_bytes = max(high_water, self.high_water_bytes or 0)
        self._read(_disable_profiler())

    def mark(self, name: str) -> None:
        """Begin a span."""
        is_outside = name != OPTIMIZER_MARK and torch._C._current_graph_task_id() == -1
        if is_outside and time.monotonic() - self._started > PART_S:
            self.__exit__(None, None, None)
            trim_memory()
            reset_peak_rss()
            self.__enter__()
        with record_function(_PREFIX + name):
            pass

    def spans(self) -> list[Span]:
        """See `AllocationLog`."""
        return self._spans

    def _read(self, results: Any) -> None:
        """Add the events of one part."""
        events: list[tuple[int, str, int]] = []
        for event in results.events():
            name = event.name()
            if name == "[memory]" and event.device_type() == _CPU:
                events.append((event.start_ns(), "", event.nbytes()))
            elif name.startswith(_PREFIX):
                events.append((event.start_ns(), name.removeprefix(_PREFIX), 0))
        events.sort(key=lambda event: event[0])
        current, peak = self._current, self._current.peak_bytes if self._current else 0
        for _, name, size in events:
            if name:
                if current:
                    self._spans.append(dataclasses.replace(current, peak_bytes=peak))
                current, peak = Span(name, self._held, self._held), self._held
            self._held += size
            peak = max(peak, self._held)
        self._current = dataclasses.replace(current, peak_bytes=peak) if current else None


class CudaLog:
    """CUDA's caching allocator, read at every mark, above what it held before."""

    high_water_bytes: int | None = None

    def __init__(self, device: torch.device):
        self._device = device
        self.before_bytes = 0
        self._marks: list[Span] = []
        self._current: tuple[str, int] | None = None

    def __enter__(self) -> CudaLog:
        # cuBLAS allocates its workspace at its first product, once per thread: let it do so before.
        one = torch.ones(16, 16, device=self._device, requires_grad=True)
        torch.autograd.backward((one @ one).sum())
        del one
        torch.cuda.synchronize(self._device)
        self.before_bytes = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to stop."""

    def mark(self, name: str) -> None:
        """Begin a span."""
        if self._current:
            peak = torch.cuda.max_memory_allocated(self._device) - self.before_bytes
            self._marks.append(Span(*self._current, peak))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._current = name, torch.cuda.memory_allocated(self._device) - self.before_bytes

    def spans(self) -> list[Span]:
        """See `AllocationLog`."""
        return self._marks
