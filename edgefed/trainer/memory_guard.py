"""Reacts when memory gets tight or runs out during a round: the plan shrinks, the owner is told, the round continues.

    pressure between two steps   return freed memory to the system; if pressure remains or comes back, take the first
                                 fallback that frees what is missing. Finished steps are kept
    out of memory anywhere       take the next fallback; the local steps start again from the global weights
    GPU lost                     the round ends with an error that says what to do

An optimizer step that ran out of memory may have changed half of the weights, so what it trained is discarded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from edgefed.costs.fallbacks import Fallback
from edgefed.costs.step_setup import StepSetup
from edgefed.errors import DeviceLost, OutOfMemory
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.memory import format_bytes, process_rss_bytes
from edgefed.hardware.watch import Pressure, PressureWatch
from edgefed.kernels.out_of_memory import free_memory
from edgefed.moe.model import MoeModel
from edgefed.progress import ProgressSink
from edgefed.training.encoding import TokenBlocks
from edgefed.training.loss import chunking_problem
from edgefed.training.steps import STOP

MAX_SHRINKS = 40
"""In one round. No model has as many fallbacks, so this only stops an endless loop."""

PATIENCE_S = 30.0
"""How long training waits for other programs to free memory once no fallback is left."""

POLL_S = 0.5
"""How often it looks while it waits."""

CALM_STEPS = 5
"""After so many steps without pressure, returning freed memory is tried again before a fallback is taken."""


class PlanShrunk(Exception):
    """The round needs a smaller plan: its local steps start again. Never leaves the trainer."""


def check_chunked_loss(
    model: MoeModel, blocks: TokenBlocks | None, exclude: Callable[[str, str], None], progress: ProgressSink
) -> None:
    """Compare the chunked loss with the model's own; if they differ, ``exclude`` it and raise PlanShrunk.

    ``exclude(saving, reason)`` takes it out of later plans.
    """
    assert blocks is not None, "the data has been encoded"
    if problem := chunking_problem(model.module, blocks.input_ids, blocks.labels):
        progress.message(f"memory: the loss of this model cannot be computed in chunks: {problem}")
        exclude("chunked_loss", problem)
        raise PlanShrunk


class MemoryGuard:
    """The guard of one round.

    ``shrink(missing_bytes)`` takes the next fallback that frees so much (0: unknown) and returns it with its plan, None
    when nothing is left. Pressure from ``watch``
    that no fallback relieves is waited for: ``patience_s`` seconds, looking every ``poll_s``.
    """

    def __init__(
        self,
        shrink: Callable[[int], tuple[Fallback, ExpertPlan] | None],
        progress: ProgressSink,
        device: str,
        watch: PressureWatch | None = None,
        patience_s: float = PATIENCE_S,
        poll_s: float = POLL_S,
    ):
        self.num_shrinks = 0
        self.plan: ExpertPlan | None = None
        """The plan of the last fallback that changed it; None before."""
        self._shrink = shrink
        self._progress = progress
        self._device = device
        self._watch = watch
        self._patience_s, self._poll_s = patience_s, poll_s
        self._settling = False
        self._calm_steps = CALM_STEPS
        if watch is not None:
            watch.on_event = lambda name, sentence: progress.message(sentence)

    def reconsider(self) -> StepSetup | Literal["stop"] | None:
        """Called between two steps: the setup for the steps that follow, or None to go on as before.

        Returns `STOP` when ``plan`` is another one now. Raises OutOfMemory when memory stays tight and no fallback is
        left, DeviceLost.
        """
        watch = self._watch
        if watch is None:
            return None
        if watch.lost():
            raise DeviceLost(f"{watch.lost()} in the middle of a round")
        pressure = watch.pressure()
        if pressure is None:
            self._settling = False
            self._calm_steps += 1
            return None
        if self._settling:  # measured before the first step with the last fallback was over
            self._settling = False
            watch.relieve()
            return None
        if self._calm_steps >= CALM_STEPS:
            self._calm_steps = 0
            pressure = self._return_freed(watch, pressure)
            if pressure is None:
                return None
        self._calm_steps = 0
        fallback = self._take_fallback(pressure.sentence, missing_bytes=pressure.missing_bytes)
        if fallback is None:
            self._wait_for_others(watch, pressure)
            return None
        self._settling = True
        watch.relieve()
        if not fallback.keeps_plan:
            return STOP
        free_memory(self._device)
        return fallback.step_plan.setup

    def _return_freed(self, watch: PressureWatch, pressure: Pressure) -> Pressure | None:
        """Return freed memory to the system; the pressure that remains."""
        before = process_rss_bytes()
        free_memory(self._device)
        watch.relieve()
        remaining = watch.look()
        if remaining is None:
            returned = format_bytes(max(0, before - process_rss_bytes()))
            self._progress.message(f"memory: {pressure.sentence}: returned {returned} of freed memory to the system")
        return remaining

    def ran_out(self, phase: str, reason: str) -> None:
        """Memory ran out in ``phase``: take the next fallback. Raises OutOfMemory when none is left.

        Call it when the tensors of the failed step are freed.
        """
        then = "; the steps since the last change of the plan start again"
        if self._take_fallback(f"out of memory while {phase} ({reason})", then) is None:
            raise OutOfMemory(
                f"memory ran out while {phase}, and nothing is left to give up: {reason}",
                remedy="Close other programs, lower `batch_size` or `sequence_length` on the server, or use a smaller "
                "model.",
            )
        self._settling = True
        if self._watch is not None:
            self._watch.relieve()

    def _take_fallback(self, why: str, then: str = "", missing_bytes: int = 0) -> Fallback | None:
        found = self._shrink(missing_bytes) if self.num_shrinks < MAX_SHRINKS else None
        if found is None:
            return None
        fallback, plan = found
        self.num_shrinks += 1
        if not fallback.keeps_plan:
            self.plan = plan
            then = then or ("; the local steps start again" if plan.neurons else "; finished steps are kept")
        self._progress.message(f"memory: {why}: {fallback.sentence}{then}")
        return fallback

    def _wait_for_others(self, watch: PressureWatch, pressure: Pressure) -> None:
        """Wait until the pressure is over. Raises OutOfMemory when it lasts, StopRequested on Ctrl-C."""
        self._progress.message(f"memory: {pressure.sentence}, and nothing is left to give up; waiting")
        pause, left = threading.Event(), self._patience_s
        while watch.look() is not None:
            if left <= 0:
                raise OutOfMemory(f"{pressure.sentence}, for {self._patience_s:.0f} seconds, with the smallest plan")
            free_memory(self._device)
            pause.wait(self._poll_s)
            left -= self._poll_s
            self._progress.advance(0)  # raises StopRequested
        watch.relieve()
