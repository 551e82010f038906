"""From repeated samples to a number with a verdict: stable, noisy or unusable.

    warm up -> at least 7 samples -> median, MAD, best -> verdict

The median and the scaled median absolute deviation are robust: another program that disturbs one sample changes
neither. All samples are recorded, so that a reader can compute other statistics.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

MIN_SAMPLES = 7
MAX_WARM_UP = 10
WARM_UP_AGREEMENT = 0.05
"""The warm-up ends when two successive samples differ by at most this share."""
MAD_SCALE = 1.4826
"""Scales the MAD of normally distributed samples to their standard deviation."""
STABLE_BELOW, NOISY_BELOW = 0.03, 0.10
"""Relative spread (scaled MAD / median) below which samples are stable, or else noisy."""

STABLE, NOISY, UNUSABLE = "stable", "noisy", "unusable"
MEASURED = (STABLE, NOISY, UNUSABLE)
SKIPPED, FAILED, INTERRUPTED = "skipped", "failed", "interrupted"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One named result of the benchmark: a measurement, or the reason why there is none.

    ``verdict`` is stable, noisy or unusable after a measurement, else skipped, failed or interrupted: then ``median``,
    ``mad`` and ``best`` are None, ``reason`` says why, and ``samples`` may hold samples taken before. ``mad`` is scaled
    by 1.4826. A ``derived`` number was computed by the rule in ``note`` instead of observed. ``paper`` is the figure in
    the device's profile, in ``unit``; ``share`` = median / paper.
    """

    name: str
    unit: str
    verdict: str
    samples: tuple[float, ...] = ()
    median: float | None = None
    mad: float | None = None
    best: float | None = None
    better: str = "higher"
    params: dict[str, Any] = {}
    derived: bool = False
    note: str = ""
    reason: str = ""
    paper: float | None = None
    paper_source: str = ""

    @property
    def measured(self) -> bool:
        """Whether the entry has a measurement."""
        return self.verdict in MEASURED

    @property
    def share(self) -> float | None:
        """Median relative to the paper figure; None without either."""
        return self.median / self.paper if self.paper and self.median is not None else None

    @property
    def spread(self) -> float | None:
        """Scaled MAD relative to the median."""
        return None if self.median is None or self.mad is None else _relative(self.mad, self.median)

    @classmethod
    def of(
        cls, name: str, unit: str, samples: Sequence[float], *, better: str = "higher", reason: str = "", **more: Any
    ) -> Entry:
        """Make an entry of measured samples. Raises ValueError without samples."""
        numbers = summarise(samples, better)
        return cls(
            name=name, unit=unit, verdict=numbers.verdict, samples=tuple(map(float, samples)), median=numbers.median,
            mad=numbers.mad, best=numbers.best, better=better, reason=reason or numbers.reason, **more,
        )  # fmt: skip

    @classmethod
    def skipped(cls, name: str, unit: str, reason: str, **more: Any) -> Entry:
        """Make an entry of a test that is impossible or was not requested here."""
        return cls(name=name, unit=unit, verdict=SKIPPED, reason=reason, **more)

    @classmethod
    def failed(cls, name: str, unit: str, reason: str, **more: Any) -> Entry:
        """Make an entry of a test that raised an error."""
        return cls(name=name, unit=unit, verdict=FAILED, reason=reason, **more)

    @classmethod
    def interrupted(cls, name: str, unit: str, **more: Any) -> Entry:
        """Make an entry of a test that Ctrl-C stopped before it had enough samples."""
        return cls(name=name, unit=unit, verdict=INTERRUPTED, reason="stopped by Ctrl-C", **more)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of samples. ``mad`` is scaled; ``best`` is the highest or lowest sample, whichever is better.

    ``reason`` explains a verdict that does not follow from the spread alone.
    """

    median: float
    mad: float
    best: float
    verdict: str
    reason: str = ""


def summarise(samples: Sequence[float], better: str = "higher") -> Summary:
    """Compute median, scaled MAD, best and verdict. ``better``: "higher" or "lower". Raises ValueError without samples.

    Fewer than `MIN_SAMPLES` samples are never stable, fewer than 3 are unusable: their spread is meaningless.
    """
    if not samples:
        raise ValueError("no samples")
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be higher or lower, found {better!r}")
    median = statistics.median(samples)
    mad = MAD_SCALE * statistics.median([abs(sample - median) for sample in samples])
    spread = _relative(mad, median)
    verdict = STABLE if spread < STABLE_BELOW else NOISY if spread < NOISY_BELOW else UNUSABLE
    reason = ""
    if len(samples) < MIN_SAMPLES:
        reason = f"{len(samples)} of {MIN_SAMPLES} samples"
        verdict = UNUSABLE if len(samples) < 3 or verdict == UNUSABLE else NOISY
    return Summary(
        float(median), float(mad), float(max(samples) if better == "higher" else min(samples)), verdict, reason
    )


def _relative(mad: float, median: float) -> float:
    return mad / abs(median) if median else (0.0 if mad == 0 else float("inf"))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are taken. ``limit_s`` bounds a whole measurement, warm-up included; a started sample is finished."""

    repeats: int = MIN_SAMPLES
    max_warm_up: int = MAX_WARM_UP
    limit_s: float = 20.0


def collect(
    sample: Callable[[], float], sampling: Sampling, *, clock: Callable[[], float] = time.monotonic
) -> tuple[list[float], list[float]]:
    """Warm up, then take samples. Returns (samples, warm-up samples).

    The warm-up ends when two successive samples agree within 5 %, after ``max_warm_up`` samples, or at a third of the
    time limit, to leave time for samples. At least one sample is taken, even after the time limit.
    """
    started = clock()
    warm_up: list[float] = []
    while len(warm_up) < sampling.max_warm_up:
        warm_up.append(sample())
        if len(warm_up) > 1 and agree(warm_up[-2], warm_up[-1]):
            break
        if clock() - started > sampling.limit_s / 3:
            break
    samples = [sample()]
    while len(samples) < sampling.repeats and clock() - started < sampling.limit_s:
        samples.append(sample())
    return samples, warm_up


def agree(first: float, second: float) -> bool:
    """Return whether two samples differ by at most 5 % of the larger."""
    return abs(first - second) <= WARM_UP_AGREEMENT * max(abs(first), abs(second))
