"""Ratios get a verdict only between reliable numbers."""

import msgspec
import pytest

from edgefed.bench.compare import compare_reports, conditions, differences
from edgefed.bench.report import MemoryCheck
from edgefed.bench.statistics import Entry

from .made_reports import made_entry, made_report, made_sustain


def compared(a, b):
    return compare_reports(made_report(tests=(a,)), made_report(tests=(b,)))[0]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(100, 110, "faster"), (100, 90, "slower"), (100, 101.9, "same"), (100, 98.1, "same")],
)
def test_differences_count_beyond_two_per_cent(first, second, verdict):
    row = compared(made_entry(median=first), made_entry(median=second))
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(second / first)


def test_differences_within_the_spread_do_not_count():
    """Spreads of 2 % each: 3 * sqrt(2) * 2 % = 8.5 %."""
    a = made_entry(median=100, spread=0.02)
    assert compared(a, made_entry(median=108, spread=0.02)).verdict == "same"
    assert compared(a, made_entry(median=109, spread=0.02)).verdict == "faster"


def test_lower_is_better_for_times():
    a, b = (made_entry("connect", "ms", value, better="lower") for value in (10.0, 20.0))
    assert compared(a, b).verdict == "slower"
    assert compared(b, a).verdict == "faster"


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (made_entry(spread=0.05), "B: noisy"),
        (made_entry(spread=0.5), "B: unusable"),
        (Entry.failed("copy", "GB/s", "out of memory"), "B: failed (out of memory)"),
        (made_entry(unit="MB/s"), "units differ: GB/s and MB/s"),
        (made_entry(params={"size_bytes": 128}), "size_bytes differs: 64 and 128"),
        (made_entry("other"), "B: not measured"),
    ],
)
def test_reasons_against_comparing_a_test(second, reason):
    row = compared(made_entry(params={"size_bytes": 64}), second)
    assert row.verdict == "not comparable"
    assert reason in row.reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"interrupted": True}, "stopped by Ctrl-C"),
        ({"sustain": made_sustain()}, "throttled (software thermal limit)"),
        ({"host": msgspec.structs.replace(made_report().host, plugged=False)}, "on battery"),
        ({"host": msgspec.structs.replace(made_report().host, load_before=5.0)}, "busy before the start"),
        ({"device": msgspec.structs.replace(made_report().device, stand_in=True)}, "nothing was measured"),
        (
            {
                "memory": msgspec.structs.replace(
                    made_report().memory,
                    check=MemoryCheck(asked_bytes=4, verified_bytes=4, complete=True, spilled=True),
                )
            },
            "spilled",
        ),
    ],
)
def test_reasons_against_comparing_a_report(changes, reason):
    spoiled = made_report(**changes)
    assert any(reason in each for each in conditions(spoiled))
    assert not conditions(made_report())
    rows = compare_reports(made_report(), spoiled)
    assert {row.verdict for row in rows} == {"not comparable"}
    assert any(reason in each and each.startswith("B: ") for each in rows[0].reasons)


def test_a_card_at_its_power_limit_is_not_throttled():
    run = made_sustain(throttled=False, power_limited=True, reasons=("power limit",))
    assert not conditions(made_report(sustain=run))


def test_different_devices_are_named_and_compared():
    other = made_report(device=msgspec.structs.replace(made_report().device, name="B processor"))
    assert differences(made_report(), other) == ("device: A processor and B processor",)
    assert compare_reports(made_report(), other)[0].verdict == "same"
