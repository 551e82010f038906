"""Limits of a GPU, and the timing of calls on it: by CUDA events, with a cold cache, in turn.

`Stopwatch` is also for the CPU, for rehearsals: the same calls with small shapes show that a benchmark runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

FLUSH_BYTES = 512 << 20
"""Written before each timed call, so that nothing is left in the cache of level 2 (50 MB on an H100)."""


class Questions(TorchDispatchMode):
    """Counts operations that read a value on the host, or whose shape depends on values: on a GPU, the host waits."""

    ASKS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.ASKS)
        return func(*args, **(kwargs or {}))


class Stopwatch:
    """Times calls on ``device`` ("cuda" or "cpu"), counts when the host waits for it, and measures its memory."""

    def __init__(self, device: str):
        self.device = device
        self.is_gpu = device == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.is_gpu else 0, dtype=torch.int8, device=device)

    def interleaved(self, runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
        """The shortest time of each, in seconds; they take turns, so that all see the same machine."""
        for run in runs.values():
            for _ in range(2):  # compiles, allocates
                run()
        shortest = dict.fromkeys(runs, float("inf"))
        for _ in range(repetitions):
            for name, run in runs.items():
                shortest[name] = min(shortest[name], self._once(run))
        return shortest

    def _once(self, run: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host is to be ahead when the first kernel starts, or its own time would be measured: on a real device it
        # is ahead in all layers but the first. What it takes is measured apart (`host_time`).
        torch.cuda._sleep(2_000_000)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_time(self, run: Callable[[], object], repetitions: int) -> float:
        """Shortest time in seconds that the host takes to send the call off."""
        shortest = float("inf")
        for _ in range(repetitions):
            if self.is_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    def wall_times(self, runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
        """The shortest wall time of each in seconds, four calls at a time, host and device together; in turn."""
        calls = 4 if self.is_gpu else 1
        shortest = dict.fromkeys(runs, float("inf"))
        for _ in range(repetitions):
            for name, run in runs.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                self.synchronize()
                shortest[name] = min(shortest[name], (time.perf_counter() - start) / calls)
        return shortest

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give the memory of freed tensors back."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def host_waits(self, run: Callable[[], object]) -> int:
        """How often torch says that the host waited for the GPU in a call; on the CPU, how often it would have."""
        if not self.is_gpu:
            with Questions() as questions:
                run()
            return questions.count
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in said)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Memory that a call takes beyond what was allocated before it; None on the CPU."""
        if not self.is_gpu:
            run()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def limits(self, *, size: int = 8192) -> dict:
        """Bandwidth of reading 1 GiB, and rates of square products of ``size``, of this run."""
        elements = (1 << 28) if self.is_gpu else (1 << 22)
        values = torch.ones(elements, device=self.device)
        times = self.interleaved({"read": values.sum}, 10)
        found: dict = {"read_gb_per_s": round(elements * 4 / times["read"] / 1e9, 1)}
        del values
        size = size if self.is_gpu else 256
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            with FlopCounterMode(display=False) as counter:
                a @ b
            rate = counter.get_total_flops() / self.interleaved({"": lambda a=a, b=b: a @ b}, 10)[""]
            found[f"{str(dtype)[6:]}_gop_per_s"] = round(rate / 1e9)
        return found


def device_facts(device: str) -> dict:
    """Name, memory and driver of the GPU, for a row of a result."""
    if device != "cuda":
        return {"device": device, "rehearsal": "small shapes on the CPU: the numbers mean nothing"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "processors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "bitsandbytes": _version("bitsandbytes"),
    }


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
