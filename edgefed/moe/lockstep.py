"""Forward passes of the full model with only some of its experts in memory.

**Streams.** `open_streams` gives each layer its experts, with a choice of how many are resident at a time:

    residency    in memory at a time              reads of an expert
    expert       one expert, not quantized        one per batch that needs it
    layer        all experts of one layer (GPU:   one per pass; one in all if the batches run in lockstep
                 and the next, which loads
                 by way of pinned buffers
                 while this one computes)
    all          all experts                      one

The experts of a layer can be stored quantized (`edgefed.moe.slots`); each is quantized as soon as it is read.

**Lockstep.** `run_in_lockstep([pass_1, pass_2, ...])` runs several forward passes of one model layer by layer, one pass
at a time. Each pass runs in its own thread and calls `pause()` where it needs the next layer's experts; then the next
pass continues. All passes have left layer l before any of them enters layer l + 1, so each layer is loaded once,
whatever the model's code looks like, and a paused pass keeps only its hidden states.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Sequence

import torch

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan, Role
from edgefed.kernels.masked_experts import Slots
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import ExpertBank
from edgefed.moe.expert_stream import StagedCopies
from edgefed.moe.slots import StreamedSlots, check_storage
from edgefed.moe.units import ExpertSource, TrainScope

RESIDENCY = ("expert", "layer", "all")
Load = Callable[..., ExpertBank]
"""Loads a layer's experts."""
_current: contextvars.ContextVar[_Turn | None] = contextvars.ContextVar("edgefed_lockstep", default=None)


class _Abandoned(BaseException):
    """Unwinds a paused pass after another one failed. Not an Exception, so that a model's code does not catch it."""


class _Turn:
    """One pass in its own thread. It runs between `advance` and its next `pause`, or its end."""

    def __init__(self, work: Callable[[], None], device: torch.device):
        self.failure: BaseException | None = None
        self.over = False
        self._work, self._device = work, device
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="edgefed-lockstep", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run the pass until it pauses or ends."""
        self._go.release()
        self._stopped.acquire()
        if self.over:
            self._thread.join()

    def abandon(self) -> None:
        """Unwind the pass from where it paused."""
        if not self.over:
            self._abandoned = True
            self.advance()

    def pause(self) -> None:
        """Called by the pass: stop until the next `advance`."""
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                _current.set(self)
                # A new thread inherits neither the grad mode nor the current GPU.
                index = self._device.index if self._device.type == "cuda" else None
                with torch.no_grad(), torch.cuda.device(index if index is not None else -1):
                    self._work()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again in the waiting thread
            self.failure = error
        finally:
            self.over = True
            self._stopped.release()


def pause() -> None:
    """Let the other passes reach the same point. Does nothing outside of `run_in_lockstep`."""
    turn = _current.get()
    if turn is not None:
        turn.pause()


def run_in_lockstep(
    passes: Sequence[Callable[[], None]], device: torch.device, on_round: Callable[[int], None] = lambda number: None
) -> None:
    """Run ``passes`` without gradients, in turns from pause to pause. Calls ``on_round`` after each turn, from 1.

    If a pass fails, the others are unwound and its exception is raised.
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


def open_streams(
    layers: Sequence[ExpertLayer],
    source: ExpertSource,
    scope: TrainScope,
    device: torch.device,
    residency: str,
    storage: str | None,
    ahead: bool | None = None,
) -> list[Callable[[], Slots]]:
    """Return one function per layer that gives its experts by slot; slot e is expert e.

    With ``ahead``, a thread loads the next layer while one computes (None: on a GPU), if ``residency`` is "layer". Two
    layers are in memory then. Raises ConfigError.
    """
    check_storage(storage)
    if residency not in RESIDENCY:
        raise ConfigError(f"residency of a streamed model must be {', '.join(RESIDENCY)}; found {residency!r}")

    def return_slots(slots: Slots) -> Slots:
        return slots

    if residency == "expert":
        if storage is not None:
            raise ConfigError(f"experts that are read one at a time cannot be stored as {storage}")
        streamed = [StreamedSlots(layer, source, scope, device) for layer in layers]
        return [functools.partial(return_slots, slots) for slots in streamed]
    plan = ExpertPlan.full([layer.num_experts for layer in layers], Role.FROZEN)
    banks: dict[int, ExpertBank] = {}

    load: Load = functools.partial(ExpertBank, plan=plan, source=source, scope=scope, device=device, storage=storage)
    if residency == "layer" and (device.type != "cpu" if ahead is None else ahead):
        load = _LoadingAhead(layers, functools.partial(load, copy=StagedCopies(device)), device)

    def slots_of(layer: ExpertLayer) -> Slots:
        pause()
        if layer.ordinal not in banks:
            if residency == "layer":
                banks.clear()
            banks[layer.ordinal] = load(layer)
        return banks[layer.ordinal].slots()

    return [functools.partial(slots_of, layer) for layer in layers]


class _LoadingAhead:
    """``load``, which also begins to load the layer after the requested one, in a thread and on a stream of its own.

    The stream waits for the kernels launched before, which may use the memory of the layer that was dropped last.
    """

    def __init__(self, layers: Sequence[ExpertLayer], load: Load, device: torch.device):
        self._layers, self._load, self._device = layers, load, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "edgefed-load")
        self._next: tuple[int, concurrent.futures.Future[ExpertBank]] | None = None

    def __call__(self, layer: ExpertLayer) -> ExpertBank:
        expected, self._next = self._next, None
        future = expected[1] if expected is not None and expected[0] == layer.ordinal else self._begin(layer)
        bank = future.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if layer.ordinal + 1 < len(self._layers):
            self._next = layer.ordinal + 1, self._begin(self._layers[layer.ordinal + 1])
        return bank

    def _begin(self, layer: ExpertLayer) -> concurrent.futures.Future[ExpertBank]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._executor.submit(self._load_on_stream, layer)

    def _load_on_stream(self, layer: ExpertLayer) -> ExpertBank:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return self._load(layer)
