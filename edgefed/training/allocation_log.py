"""What an allocator held between marks: read from CUDA's own counters, or from the CPU profiler's events."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_PREFIX = "edgefed:"


@dataclasses.dataclass(frozen=True)
class Span:
    """From one mark to the next: bytes held at its start, and the most held in it."""

    name: str
    start_bytes: int
    peak_bytes: int


class CpuLog:
    """The CPU allocator's events, from the profiler."""

    before_bytes = 0
    """What the allocator held before: it does not say."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> CpuLog:
        level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = "99"  # or it writes two lines to stderr; read when the first profiler starts
        try:
            self._profile.__enter__()
        finally:
            del os.environ["KINETO_LOG_LEVEL"]
            if level is not None:
                os.environ["KINETO_LOG_LEVEL"] = level
        return self

    def __exit__(self, *exception: object) -> None:
        self._profile.__exit__(*exception)

    def mark(self, name: str) -> None:
        with record_function(_PREFIX + name):
            pass

    def spans(self) -> list[Span]:
        events = []
        for event in self._profile.profiler.kineto_results.events():
            name = event.name()
            if name == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
                events.append((event.start_ns(), "", event.nbytes()))
            elif name.startswith(_PREFIX):
                events.append((event.start_ns(), name.removeprefix(_PREFIX), 0))
        events.sort(key=lambda event: event[0])
        spans: list[Span] = []
        held, start, peak, current = 0, 0, 0, None
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
        # cuBLAS takes its workspace from the allocator at its first product, once for each thread: have it before.
        one = torch.ones(16, 16, device=self._device, requires_grad=True)
        (one @ one).sum().backward()
        del one
        torch.cuda.synchronize(self._device)
        self.before_bytes = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def mark(self, name: str) -> None:
        if self._current:
            peak = torch.cuda.max_memory_allocated(self._device) - self.before_bytes
            self._marks.append(Span(*self._current, peak))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._current = name, torch.cuda.memory_allocated(self._device) - self.before_bytes

    def spans(self) -> list[Span]:
        return self._marks
