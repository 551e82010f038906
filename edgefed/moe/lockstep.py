"""Several forward passes of one model that go through its layers together, one of them running at a time.

    run_in_lockstep([pass_1, pass_2, ...])     each pass calls `pause()` where it needs the next layer's experts

Each pass runs in a thread of its own until it pauses, then the next one goes on: all have left layer l before any of
them enters layer l + 1. So what a layer needs is loaded once, whatever the model looks like, and a paused pass keeps
no more than the hidden states that it has in its hands.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence

import torch

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan, Role
from edgefed.kernels.masked_experts import Slots
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import ExpertBank, StreamedSlots
from edgefed.moe.packed import check_storage
from edgefed.moe.units import ExpertSource, TrainScope

_current: contextvars.ContextVar[_Turn | None] = contextvars.ContextVar("edgefed_lockstep", default=None)


class _Abandoned(BaseException):
    """Unwinds a paused pass whose fellow has failed. No Exception: a model's code must not catch it."""


class _Turn:
    """One pass: runs while ``go`` is set, and sets ``rests`` when it pauses or ends."""

    def __init__(self, work: Callable[[], None], device: torch.device):
        self.failure: BaseException | None = None
        self.over = False
        self._work, self._device = work, device
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="edgefed-lockstep", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Let it run until it pauses or ends."""
        self._go.release()
        self._rests.acquire()
        if self.over:
            self._thread.join()

    def abandon(self) -> None:
        """Unwind it where it paused."""
        if not self.over:
            self._abandoned = True
            self.advance()

    def pause(self) -> None:
        self._rests.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                _current.set(self)
                # Neither the grad mode nor the current GPU is handed on to a new thread.
                index = self._device.index if self._device.type == "cuda" else None
                with torch.no_grad(), torch.cuda.device(index if index is not None else -1):
                    self._work()
        except _Abandoned:
            pass
        except BaseException as failure:  # raised again in the thread that waits
            self.failure = failure
        finally:
            self.over = True
            self._rests.release()


def pause() -> None:
    """Let the other passes come to the same point. Does nothing outside of `run_in_lockstep`."""
    turn = _current.get()
    if turn is not None:
        turn.pause()


def run_in_lockstep(
    passes: Sequence[Callable[[], None]], device: torch.device, on_round: Callable[[int], None] = lambda number: None
) -> None:
    """Run ``passes``, without gradients, side by side from pause to pause; ``on_round`` hears of each round, from 1.

    Raises what the first that fails raises, when all others have been unwound.
    """
    turns = [_Turn(work, device) for work in passes]
    number = 0
    try:
        while running := [turn for turn in turns if not turn.over]:
            for turn in running:
                turn.advance()
                if turn.failure is not None:
                    raise turn.failure
            number += 1
            on_round(number)
    finally:
        for turn in turns:
            turn.abandon()


# The experts of the full model for a forward pass that needs all of them, held as few at a time as there is room for.
#
#     hold      in memory at a time                       reads of an expert
#     expert    one expert, as it comes                   one per batch that needs it
#     layer     all experts of one layer                  one per pass; with `edgefed.moe.lockstep` all batches are one
#     all       all experts                               one
#
# Those of a layer can be held quantised (`edgefed.moe.packed`), each quantised as it is read.

HOLDS = ("expert", "layer", "all")


def open_streams(
    layers: Sequence[ExpertLayer],
    source: ExpertSource,
    scope: TrainScope,
    device: torch.device,
    hold: str,
    storage: str | None,
) -> list[Callable[[], Slots]]:
    """For each layer, what gives its experts by slot, slot e being expert e. Raises ConfigError."""
    check_storage(storage)
    if hold not in HOLDS:
        raise ConfigError(f"a full model can hold one expert, one layer or all at a time; asked for {hold!r}")
    if hold == "expert":
        if storage is not None:
            raise ConfigError(f"experts that are read one at a time are used as they come, not as {storage}")
        streamed = [StreamedSlots(layer, source, scope, device) for layer in layers]
        return [lambda slots=slots: slots for slots in streamed]
    plan = ExpertPlan.full([layer.num_experts for layer in layers], Role.FROZEN)
    banks: dict[int, ExpertBank] = {}

    def slots_of(layer: ExpertLayer) -> Slots:
        pause()
        if layer.ordinal not in banks:
            if hold == "layer":
                banks.clear()
            banks[layer.ordinal] = ExpertBank(layer, plan, source, scope, device, storage)
        return banks[layer.ordinal].slots()

    return [lambda layer=layer: slots_of(layer) for layer in layers]
