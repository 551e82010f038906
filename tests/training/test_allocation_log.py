"""What the CPU allocator's events say, and what recording them costs."""

from __future__ import annotations

import torch

from edgefed.hardware.memory import process_rss_bytes
from edgefed.training.allocation_log import CpuLog, Span

MIB = 2**20


def test_spans_have_the_bytes_at_their_start_and_the_most_within_them():
    log = CpuLog()
    with log:
        log.mark("first")
        kept = torch.empty(2 * MIB, dtype=torch.uint8)
        torch.empty(5 * MIB, dtype=torch.uint8)
        log.mark("second")
        del kept
        log.mark("end")
    assert log.spans() == [Span("first", 0, 7 * MIB), Span("second", 2 * MIB, 2 * MIB)]


def test_recording_many_operations_takes_little_memory():
    """The profiler's record of an operation took 25 KiB."""
    x, log = torch.ones(16), CpuLog()
    before = process_rss_bytes()
    with log:
        log.mark("first")
        for _ in range(4000):
            x.mul_(x)
        log.mark("end")
    assert len(log.spans()) == 1
    assert process_rss_bytes() - before < 4000 * 8 * 1024
