"""The passive meter, on a clock that only the test moves."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefed.agent.network import ENOUGH_BYTES, HALF_LIFE_S, TINY_BYTES, Throughput

CHUNK = 100_000
BIG = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock) -> Throughput:
    return Throughput(clock=clock)


def receive(meter: Throughput, clock: Clock, chunks: int, every_s: float, chunk: int = CHUNK) -> None:
    """One download whose chunks arrive at a steady pace."""
    with meter.transfer(BIG) as pace:
        for number in range(chunks):
            clock.now += every_s if number else 0.0
            pace.moved(chunk)


def test_no_rate_before_enough_bytes_have_moved(meter, clock):
    assert meter.bytes_per_s is None
    assert meter.observed == (0, 0.0)
    receive(meter, clock, 3, 0.1)
    assert meter.bytes_per_s is None, f"{2 * CHUNK} bytes are less than {ENOUGH_BYTES}"
    receive(meter, clock, 3, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert meter.observed == (4 * CHUNK, pytest.approx(0.4))


def test_the_first_chunk_starts_the_clock(meter, clock):
    receive(meter, clock, 101, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert meter.observed[0] == 100 * CHUNK


def test_idle_time_does_not_count(meter, clock):
    for _ in range(20):
        clock.now += 3600
        receive(meter, clock, 11, 0.1)
        clock.now += 3600
    assert meter.bytes_per_s == pytest.approx(1e6)


def test_tiny_transfers_are_left_out(meter, clock):
    for _ in range(1000):
        with meter.transfer(TINY_BYTES - 1) as pace:
            pace.start()
            clock.now += 1.0
            pace.moved(TINY_BYTES - 1)
            pace.finish()
    assert meter.observed == (0, 0.0)


def test_overlapping_transfers_share_the_clock(meter, clock):
    with meter.transfer(BIG) as one, meter.transfer(BIG) as two:
        for _ in range(50):
            clock.now += 0.05
            one.moved(CHUNK)
            clock.now += 0.05
            two.moved(CHUNK)
    assert meter.bytes_per_s == pytest.approx(2e6)
    assert meter.observed == (99 * CHUNK, pytest.approx(4.95)), "only the very first chunk came before the clock"


def test_an_upload_lasts_from_its_first_byte_to_the_reply(meter, clock):
    """A send buffer takes the whole file at once, then the line needs four seconds for it."""
    with meter.transfer(4_000_000) as pace:
        pace.start()
        for _ in range(40):
            pace.moved(CHUNK)
        assert meter.bytes_per_s is None, "no time has passed"
        clock.now += 4.0
        pace.finish()
    assert meter.observed == (4_000_000, 4.0)
    assert 0.85e6 < meter.bytes_per_s < 1e6, "older bytes count a little less than newer seconds"


def test_a_broken_transfer_ends_with_its_last_chunk(meter, clock):
    with pytest.raises(TimeoutError), meter.transfer(BIG) as pace:  # noqa: PT012  the context under test must be left by an error
        pace.start()
        for _ in range(10):
            clock.now += 0.1
            pace.moved(CHUNK)
        clock.now += 60.0
        raise TimeoutError
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert meter.observed[1] == pytest.approx(1.0)
    receive(meter, clock, 11, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e6)


def test_a_transfer_without_bytes_is_not_counted(meter, clock):
    with pytest.raises(TimeoutError), meter.transfer(BIG):
        raise TimeoutError
    receive(meter, clock, 11, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e6)


def test_old_transfers_lose_half_their_weight_per_half_life(meter, clock):
    receive(meter, clock, round(10 * HALF_LIFE_S / 0.1) + 1, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e6)
    receive(meter, clock, round(HALF_LIFE_S / 0.1) + 1, 0.1, 3 * CHUNK)
    assert meter.bytes_per_s == pytest.approx(2e6, rel=2e-3)


def test_pauses_inside_a_transfer_lower_the_rate(meter, clock):
    with meter.transfer(BIG) as pace:
        pace.start()
        for _ in range(5):
            clock.now += 3 * HALF_LIFE_S
            pace.moved(6_000_000)
    assert meter.bytes_per_s == pytest.approx(1e5)


@given(st.lists(st.tuples(st.integers(50_000, 5_000_000), st.floats(0.05, 50.0)), min_size=8, max_size=40))
def test_the_rate_lies_between_the_slowest_and_the_fastest_chunk(chunks):
    clock = Clock()
    meter = Throughput(clock=clock)
    with meter.transfer(BIG) as pace:
        pace.start()
        for size, seconds in chunks:
            clock.now += seconds
            pace.moved(size)
    rates = [size / seconds for size, seconds in chunks]
    assert min(rates) * 0.999999 <= meter.bytes_per_s <= max(rates) * 1.000001


def test_concurrent_transfers_count_every_byte():
    meter = Throughput()

    def work() -> None:
        for _ in range(50):
            with meter.transfer(BIG) as pace:
                pace.start()
                for _ in range(20):
                    pace.moved(1000)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert meter.observed[0] == 8 * 50 * 20 * 1000
    assert meter.active == 0
