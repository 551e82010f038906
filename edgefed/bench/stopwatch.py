"""Timing on a torch device: what a queue of kernels takes, not what it takes to queue them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Times calls on one device, ``cpu`` or ``cuda:N``."""

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for everything that was queued. Raises what the queue raised."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Seconds of one of ``times`` calls of ``work`` in a row: CUDA events on a GPU, the clock on a CPU."""
        if self.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                self.synchronize()
                begin.record()
                for _ in range(times):
                    work()
                end.record()
                end.synchronize()
            return begin.elapsed_time(end) / 1e3 / times
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    def calls_for(self, work: Callable[[], object], sample_s: float) -> tuple[int, float]:
        """How many calls make a sample of about ``sample_s``, and what one took after a first one that warmed up.

        At most 1000; one when a single call already takes longer.
        """
        self.seconds(work)
        once = max(self.seconds(work), 1e-7)
        return max(1, min(1000, math.ceil(sample_s / once))), once

    def release(self) -> None:
        """Give what is not used any more back to the device, so that the next measurement starts with all of it."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
