"""Median, spread and verdict by hand; warm-up and sampling with a fake clock."""

import math

import pytest

from edgefed.bench.statistics import Entry, Sampling, agree, collect, summarise


def test_median_and_scaled_mad_by_hand():
    # deviations from 100: 4 2 1 0 1 3 400 -> median 2
    numbers = summarise([96, 98, 99, 100, 101, 103, 500])
    assert numbers.median == 100
    assert numbers.best == 500
    assert numbers.mad == pytest.approx(2 * 1.4826)
    assert numbers.verdict == "stable"
    assert not numbers.reason


def test_best_is_the_lowest_where_lower_is_better():
    assert summarise([3, 1, 2, 2, 2, 2, 2], "lower").best == 1
    with pytest.raises(ValueError, match="higher or lower"):
        summarise([1.0], "more")


@pytest.mark.parametrize(
    ("deviation", "verdict"), [(2.02, "stable"), (2.03, "noisy"), (6.74, "noisy"), (6.75, "unusable")]
)
def test_verdicts_change_at_three_and_ten_per_cent(deviation, verdict):
    """MAD 2.02 * 1.4826 = 2.995 %, 2.03 * 1.4826 = 3.01 %; 6.74 -> 9.99 %, 6.75 -> 10.01 %."""
    samples = [
        100,
        100 - deviation,
        100 + deviation,
        100 - deviation,
        100 + deviation,
        100 - deviation,
        100 + deviation,
    ]
    assert summarise(samples).verdict == verdict


def test_few_samples_are_never_stable():
    assert summarise([5.0] * 6).verdict == "noisy"
    assert summarise([5.0] * 6).reason == "6 of 7 samples"
    assert summarise([5.0] * 2).verdict == "unusable"
    assert summarise([5.0] * 7).verdict == "stable"
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_median_of_zero_has_no_relative_spread():
    assert summarise([0.0] * 7).verdict == "stable"
    assert summarise([-1, 0, 1, -1, 0, 1, 0]).verdict == "unusable"


class Ticking:
    """A clock that only moves when a sample is taken."""

    def __init__(self, values, step_s=0.0):
        self.values, self.step_s, self.now, self.taken = iter(values), step_s, 0.0, 0

    def sample(self):
        self.now += self.step_s
        self.taken += 1
        return next(self.values)

    def clock(self):
        return self.now


def test_the_warm_up_ends_when_two_successive_samples_agree():
    source = Ticking([10, 20, 30, 31, 1, 2, 3])
    samples, warm_up = collect(source.sample, Sampling(repeats=3), clock=source.clock)
    assert warm_up == [10, 20, 30, 31]
    assert samples == [1, 2, 3]


def test_the_warm_up_ends_after_ten_that_never_agree():
    source = Ticking([2.0**n for n in range(20)])
    samples, warm_up = collect(source.sample, Sampling(repeats=7), clock=source.clock)
    assert len(warm_up) == 10
    assert len(samples) == 7


def test_time_bounds_a_measurement_and_leaves_at_least_one_sample():
    source = Ticking([1.0] * 50, step_s=2.0)
    samples, warm_up = collect(source.sample, Sampling(repeats=7, limit_s=9.0), clock=source.clock)
    assert len(warm_up) == 2
    assert len(samples) == 3
    source = Ticking([1.0] * 50, step_s=100.0)
    samples, warm_up = collect(source.sample, Sampling(repeats=7, limit_s=1.0), clock=source.clock)
    assert (len(warm_up), len(samples)) == (1, 1)


def test_agreement_is_relative_to_the_larger():
    assert agree(95, 100)
    assert agree(100, 95)
    assert not agree(94.9, 100)
    assert agree(0, 0)


def test_an_entry_knows_its_share_and_what_it_is():
    entry = Entry.of("copy", "GB/s", [90.0] * 7, paper=100.0)
    assert entry.measured
    assert entry.share == pytest.approx(0.9)
    assert entry.spread == 0
    for other in (Entry.skipped("x", "s", "why"), Entry.failed("x", "s", "why"), Entry.interrupted("x", "s")):
        assert not other.measured
        assert other.median is None
        assert other.reason
        assert other.share is None
    assert math.isinf(Entry.of("x", "s", [-1.0, 0, 1, 0, 1, 0, -1]).spread)
