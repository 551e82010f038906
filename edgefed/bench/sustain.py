"""A minute of work: does the device keep its speed when it gets warm?

Matrix products without a pause, a point a second; the median of the first five seconds against that of the last five.
Laptops, Jetsons in a case and phones lose a third here that no short test shows.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from edgefed.bench.compute import product
from edgefed.bench.report import Sustain, SustainPoint
from edgefed.bench.stopwatch import Stopwatch
from edgefed.hardware.nvml import POWER_CAP, SLOWED, throttle_words
from edgefed.hardware.reading import Reading

WINDOW_S = 5.0
POINT_S = 1.0
BURST_S = 0.1
"""Products between two looks at the clock: a queue that is never empty, and Ctrl-C is heard soon."""


@dataclasses.dataclass(frozen=True)
class Sensed:
    """What the sensors say at one moment. ``throttle`` are NVML's bits; ``energy_joules`` counts up."""

    clock_mhz: Reading[float]
    temperature_celsius: Reading[float]
    power_watts: Reading[float]
    throttle: Reading[int]
    energy_joules: Reading[float]


def run_sustained(
    watch: Stopwatch,
    dtype: torch.dtype,
    n: int,
    seconds: float,
    sense: Callable[[], Sensed],
    *,
    on_point: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = time.monotonic,
) -> Sustain:
    """Multiply (n, n) matrices in ``dtype`` for ``seconds`` (at least two points). ``on_point`` gets seconds done.

    Raises what the products raise, a lost device included.
    """
    work = product(watch, dtype, n)
    calls, _ = watch.calls_for(work, BURST_S)
    flops = 2 * n**3 * calls
    before = sense()
    points: list[SustainPoint] = []
    all_bits, last = 0, before
    started = clock()
    while not points or points[-1].t_s < seconds or len(points) < 2:
        since, done = clock(), 0
        while clock() - since < POINT_S:
            for _ in range(calls):
                work()
            watch.synchronize()
            done += 1
        now = clock()
        last = sense()
        bits = last.throttle.value or 0
        all_bits |= bits
        points.append(
            SustainPoint(
                t_s=round(now - started, 3),
                rate=done * flops / (now - since) / 1e12,
                clock_mhz=last.clock_mhz.value,
                temperature_celsius=last.temperature_celsius.value,
                power_watts=last.power_watts.value,
                reasons=throttle_words(bits),
            )
        )
        on_point(now - started)
    return summarise_sustained(str(dtype).removeprefix("torch."), points, all_bits, before, last)


def summarise_sustained(dtype: str, points: list[SustainPoint], bits: int, before: Sensed, after: Sensed) -> Sustain:
    """The report of a run from its points. Pure."""
    end = points[-1].t_s
    window = min(WINDOW_S, end / 2)
    first = statistics.median([point.rate for point in points if point.t_s <= window] or [points[0].rate])
    last = statistics.median([point.rate for point in points if point.t_s > end - window])
    return Sustain(
        name=f"matmul {dtype}",
        unit="TFLOPS",
        seconds=end,
        first=first,
        last=last,
        change=last / first - 1,
        throttled=bool(bits & SLOWED),
        power_limited=bool(bits & POWER_CAP),
        reasons=throttle_words(bits),
        points=tuple(points),
        energy_joules=energy(points, before, after),
        unknown={
            field.name: reading.describe()
            for field in dataclasses.fields(after)
            if not (reading := getattr(after, field.name)).known
        },
    )


def energy(points: list[SustainPoint], before: Sensed, after: Sensed) -> float | None:
    """Joules of the run: the device's counter where it has one, else its power integrated; None without either."""
    if before.energy_joules.known and after.energy_joules.known:
        return after.energy_joules.value - before.energy_joules.value
    powers = [point.power_watts for point in points]
    if None in powers:
        return None
    starts = [0.0, *(point.t_s for point in points)]
    return sum(power * (end - start) for power, start, end in zip(powers, starts, starts[1:], strict=False))
