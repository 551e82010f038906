"""What a memory allocator held between marks: from CUDA's own counters, or from the CPU profiler's events."""

from __future__ import annotations

import dataclasses
import os
from types import TracebackType
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

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
    """The CPU allocator's events, from the profiler."""

    before_bytes = 0

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> CpuLog:
        level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = "99"  # else it writes two lines to stderr; read when the first profiler starts
        try:
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        finally:
            del os.environ["KINETO_LOG_LEVEL"]
            if level is not None:
                os.environ["KINETO_LOG_LEVEL"] = level
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop recording."""
        self._profile.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def mark(self, name: str) -> None:
        """Begin a span."""
        with record_function(_PREFIX + name):
            pass

    def spans(self) -> list[Span]:
        """See `AllocationLog`."""
        recorded = self._profile.profiler
        if recorded is None or recorded.kineto_results is None:
            return []
        events: list[tuple[int, str, int]] = []
        for event in recorded.kineto_results.events():
            name = event.name()
            if name == "[memory]" and event.device_type() == _CPU:
                size: int = event.nbytes()  # type: ignore[attr-defined]
                events.append((event.start_ns(), "", size))
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
