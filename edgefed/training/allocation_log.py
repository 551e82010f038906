"""What a memory allocator held between marks: from CUDA's own counters, or from the CPU profiler's events."""

from __future__ import annotations

import dataclasses
import os
from types import TracebackType
from typing import Any, Protocol

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope
from torch.autograd.profiler import profile, record_function

_PREFIX = "edgefed:"
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
    gigabyte for a step with adapters on 600 experts.
    """

    before_bytes = 0

    def __init__(self) -> None:
        self._settings: Any = profile(use_kineto=True, profile_memory=True)
        self._results: Any = None

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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop recording."""
        self._results = _disable_profiler()

    def mark(self, name: str) -> None:
        """Begin a span."""
        with record_function(_PREFIX + name):
            pass

    def spans(self) -> list[Span]:
        """See `AllocationLog`."""
        if self._results is None:
            return []
        events: list[tuple[int, str, int]] = []
        for event in self._results.events():
            name = event.name()
            if name == "[memory]" and event.device_type() == _CPU:
                events.append((event.start_ns(), "", event.nbytes()))
            elif name.startswith(_PREFIX):
                events.append((event.start_ns(), name.removeprefix(_PREFIX), 0))
        events.sort(key=lambda event: event[0])
        spans: list[Span] = []
        held, start, peak, current = 0, 0, 0, ""
        for _, name, size in events:
            if name:
                if current:
                    spans.append(Span(current, start, peak))
                current, start, peak = name, held, held
            held += size
            peak = max(peak, held)
        return spans


class CudaLog:
    """CUDA's caching allocator, read at every mark, above what it held before."""

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
