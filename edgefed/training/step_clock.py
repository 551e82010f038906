"""When the steps of a round end in time."""

from __future__ import annotations


class StepClock:
    """Ends the steps of a round in time: another one begins only if a step of the mean length fits into ``limit_s``.

    ``limit_s``: seconds for all steps of a device in a round, also for those that are lost and repeated; 0: no limit.
    ``step_s``: seconds of a step where they are computed; None: as measured. A round has at least one step.
    """

    def __init__(self, limit_s: float, step_s: float | None = None):
        self._limit_s, self._step_s = limit_s, step_s
        self._spent_s, self._steps = 0.0, 0

    def count(self, measured_s: float) -> None:
        """A step was made in ``measured_s`` seconds."""
        self._spent_s += measured_s if self._step_s is None else self._step_s
        self._steps += 1

    @property
    def has_time(self) -> bool:
        """Whether another step fits."""
        return not self._limit_s or not self._steps or self._spent_s + self._mean_s <= self._limit_s

    @property
    def share(self) -> float:
        """The middle of the next step as a share of the time, which is longer if the step does not fit; 0 without."""
        ends_s = self._spent_s + self._mean_s
        return (ends_s - self._mean_s / 2) / max(self._limit_s, ends_s) if self._limit_s else 0.0

    @property
    def _mean_s(self) -> float:
        if self._step_s is not None:
            return self._step_s
        return self._spent_s / self._steps if self._steps else 0.0
