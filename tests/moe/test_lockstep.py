"""Passes that run in lockstep: order, failures and cleanup."""

from __future__ import annotations

import threading

import pytest
import torch

from edgefed.errors import CheckpointError
from edgefed.moe.lockstep import open_streams, pause, run_in_lockstep
from edgefed.moe.units import TrainScope

CPU = torch.device("cpu")


def waiting_threads():
    return [thread for thread in threading.enumerate() if thread.name == "edgefed-lockstep"]


def test_all_passes_reach_a_point_before_any_continues():
    seen, rounds = [], []

    def steps(name, count):
        def run():
            for step in range(count):
                seen.append((name, step))
                pause()
            seen.append((name, "end"))

        return run

    run_in_lockstep([steps("a", 2), steps("b", 2), steps("c", 1)], CPU, rounds.append)
    assert seen == [
        ("a", 0), ("b", 0), ("c", 0),
        ("a", 1), ("b", 1), ("c", "end"),
        ("a", "end"), ("b", "end"),
    ]  # fmt: skip
    assert rounds == [1, 2, 3]
    assert not waiting_threads()


def test_one_runs_at_a_time_without_gradients():
    running, most = [], []

    def run():
        for _ in range(3):
            running.append(1)
            most.append(len(running))
            assert not torch.is_grad_enabled()
            running.pop()
            pause()

    with torch.enable_grad():
        run_in_lockstep([run] * 5, CPU)
    assert set(most) == {1}
    assert len(most) == 15


def test_a_failure_unwinds_the_others_and_is_raised():
    unwound, reached = [], []

    def fine():
        try:
            pause()
            reached.append(1)
        except Exception:  # a model's code may do this; it must not block the pass
            reached.append("caught")
        finally:
            unwound.append(1)

    def broken():
        raise ValueError("no such expert")

    with pytest.raises(ValueError, match="no such expert"):
        run_in_lockstep([fine, broken, fine], CPU)
    assert unwound == [1]
    assert not reached
    assert not waiting_threads()


def test_the_callback_may_stop_the_passes():
    def run():
        pause()
        pause()

    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep([run, run], CPU, stop)
    assert not waiting_threads()


def test_a_pause_alone_does_nothing():
    pause()
    run_in_lockstep([], CPU)


# --- the next layer loads while one computes --------------------------------------------------------------------------


class Reads:
    """A source that notes which layers are read, and fails on one of them."""

    def __init__(self, source, broken=-1):
        self.source, self.broken, self.layers = source, broken, []
        self.begun = {layer: threading.Event() for layer in range(2)}

    def read(self, key):
        layer = int(key.split(".")[2])
        self.layers.append(layer)
        self.begun[layer].set()
        if layer == self.broken:
            raise CheckpointError(f"cannot read {key!r}")
        return self.source.read(key)


def test_the_next_layer_is_loaded_before_it_is_requested(olmoe):
    model, source = olmoe.device(olmoe.units())
    reads, scope = Reads(source), TrainScope(experts="none", router="none")
    first, second = open_streams(model.layers, reads, scope, CPU, "layer", "nf4", ahead=True)
    first()
    assert reads.begun[1].wait(30), "nobody has requested the second layer"
    slots = second()
    _, expected = open_streams(model.layers, source, scope, CPU, "all", "nf4")
    for found, other in zip(slots, expected(), strict=True):  # copied by way of two buffers in turn
        for matrix, same in ((found.up, other.up), (found.down, other.down)):
            assert torch.equal(matrix.packed, same.packed)
            assert torch.equal(matrix.absmax, same.absmax)
    assert reads.layers == [0] * 8 + [1] * 8, "each expert once, one layer after the other"
    first()  # the next batch begins again
    assert reads.layers[16:24] == [0] * 8


def test_a_layer_that_cannot_be_loaded_ahead_fails_where_it_is_used(olmoe):
    model, source = olmoe.device(olmoe.units())
    scope = TrainScope(experts="none", router="none")
    first, second = open_streams(model.layers, Reads(source, broken=1), scope, CPU, "layer", None, ahead=True)
    first()
    with pytest.raises(CheckpointError, match="cannot read"):
        second()
