"""What happens in a round when memory gets tight or runs out: the plan shrinks, the owner hears of it, the round goes on.

    pressure between two steps     the next fallback that frees memory; one that keeps the plan applies from the next step
    out of memory anywhere         the next fallback, and the round's local steps start again from the global weights
    GPU lost                       the round ends with an error that says what to do

An optimizer step that ran out of memory may have changed half of the weights, so what was trained is thrown away.
"""  # noqa: E501

from __future__ import annotations

import threading
from collections.abc import Callable

from edgefed.costs.fallbacks import Fallback
from edgefed.costs.memory import StepSetup
from edgefed.errors import DeviceLost, OutOfMemory
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.watch import Pressure, PressureWatch
from edgefed.progress import ProgressSink
from edgefed.training.out_of_memory import free_memory

MAX_SHRINKS = 40
"""In one round; more than the search has fallbacks for any model, so this ends only what would never end."""

PATIENCE_S = 30.0
"""How long training waits, with nothing left to give up, for other programs to give memory back."""

_LOOK_S = 0.5


class PlanShrunk(Exception):
    """The round needs a smaller plan: its local steps start again. Never leaves the trainer."""


class MemoryGuard:
    """The guard of one round. ``shrink`` goes down by one fallback and returns it with its plan, or None at the end."""

    def __init__(
        self,
        shrink: Callable[[], tuple[Fallback, ExpertPlan] | None],
        progress: ProgressSink,
        device: str,
        watch: PressureWatch | None = None,
        patience_s: float = PATIENCE_S,
    ):
        self.num_shrinks = 0
        self.plan: ExpertPlan | None = None
        """The plan that the last fallback asks for; None: as it was."""
        self._shrink = shrink
        self._progress = progress
        self._device = device
        self._watch = watch
        self._patience_s = patience_s
        self._settling = False
        if watch is not None:
            watch.on_event = lambda name, sentence: progress.message(sentence)

    def reconsider(self) -> StepSetup | None:
        """Between two steps: the setup of the steps that follow, or None to go on as before.

        Raises PlanShrunk when the plan has to change, OutOfMemory when memory stays tight and nothing is left to give
        up, DeviceLost.
        """
        watch = self._watch
        if watch is None:
            return None
        if watch.lost():
            raise DeviceLost(f"{watch.lost()} in the middle of a round")
        pressure = watch.pressure()
        if pressure is None:
            self._settling = False
            return None
        if (
            self._settling
        ):  # seen before the first step with the last fallback was over: it says nothing of that fallback
            self._settling = False
            watch.relieve()
            return None
        fallback = self._go_down(pressure.sentence)
        if fallback is None:
            self._wait_for_others(pressure)
            return None
        self._settling = True
        watch.relieve()
        if not fallback.keeps_plan:
            raise PlanShrunk
        free_memory(self._device)
        return fallback.load.setup

    def ran_out(self, doing: str, text: str) -> None:
        """Memory ran out while ``doing``: go down by one fallback. Raises OutOfMemory when there is none.

        What the failed step held should be free by now.
        """
        if self._go_down(f"out of memory while {doing} ({text})", "; the local steps start again") is None:
            raise OutOfMemory(
                f"memory ran out while {doing}, and nothing is left to give up: {text}",
                remedy="Close other programs, lower `batch_size` or `sequence_length` on the server, or use a smaller "
                "model.",
            )
        self._settling = True
        if self._watch is not None:
            self._watch.relieve()

    def _go_down(self, why: str, then: str = "") -> Fallback | None:
        if self.num_shrinks >= MAX_SHRINKS:
            return None
        found = self._shrink()
        if found is None:
            return None
        fallback, plan = found
        self.num_shrinks += 1
        if not fallback.keeps_plan:
            self.plan = plan
            then = then or "; the local steps start again"
        self._progress.message(f"memory: {why}: {fallback.sentence}{then}")
        return fallback

    def _wait_for_others(self, pressure: Pressure) -> None:
        """Hold still until the pressure is over. Raises OutOfMemory when it lasts, StopRequested on Ctrl-C."""
        self._progress.message(f"memory: {pressure.sentence}, and nothing is left to give up; waiting")
        pause, left = threading.Event(), self._patience_s
        while self._watch.pressure() is not None:
            if left <= 0:
                raise OutOfMemory(f"{pressure.sentence}, for {self._patience_s:.0f} seconds, with the smallest plan")
            free_memory(self._device)
            pause.wait(_LOOK_S)
            left -= _LOOK_S
            self._progress.advance(0)  # this is where Ctrl-C comes through
