"""What the CPU allocator's events say, and what recording them costs."""

from __future__ import annotations

import pytest
import torch

from edgefed.hardware.memory import process_rss_bytes
from edgefed.training import allocation_log
from edgefed.training.allocation_log import CpuLog, Span

MIB = 2**20


@pytest.mark.parametrize("part_s", [allocation_log.PART_S, 0.0], ids=["at once", "in parts"])
def test_spans_have_the_bytes_at_their_start_and_the_most_within_them(part_s, monkeypatch):
    monkeypatch.setattr(allocation_log, "PART_S", part_s)
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


def test_a_backward_pass_is_one_part(monkeypatch):
    """A profiler that stopped within it would be restored by autograd's threads."""
    monkeypatch.setattr(allocation_log, "PART_S", 0.0)
    log, x = CpuLog(), torch.zeros(MIB, requires_grad=True)
    with log:
        log.mark("forward")
        y = x * 2
        y.register_hook(lambda gradient: log.mark("backward"))
        y.sum().backward()
        log.mark("after")
        x.grad = None
        log.mark("end")
    assert [span.name for span in log.spans()] == ["forward", "backward", "after"]
    assert [span.start_bytes // MIB for span in log.spans()] == [0, 4, 8]  # y; y and the gradient of x


def test_an_optimizer_step_is_within_one_part(monkeypatch):
    """torch records it as a range, which must end before its profiler: else it writes the time into freed memory."""
    monkeypatch.setattr(allocation_log, "PART_S", 0.0)
    log, x, cuts = CpuLog(), torch.zeros(4, requires_grad=True), []
    optimizer = torch.optim.SGD([x])
    optimizer.register_step_pre_hook(lambda *_: log.mark(allocation_log.OPTIMIZER_MARK))
    x.grad = torch.ones(4)
    with log:
        log.mark("forward")
        monkeypatch.setattr(CpuLog, "__exit__", lambda *_: cuts.append(1))
        optimizer.step()
        assert not cuts
        monkeypatch.undo()
        log.mark("end")
    assert [span.name for span in log.spans()] == ["forward", "optimizer"]
