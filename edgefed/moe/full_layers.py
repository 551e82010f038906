"""The experts of the full model for a forward pass that needs all of them, held as few at a time as there is room for.

    hold      in memory at a time                       reads of an expert
    expert    one expert, as it comes                   one per batch that needs it
    layer     all experts of one layer                  one per pass; with `edgefed.moe.lockstep` all batches are one
    all       all experts                               one

Those of a layer can be held quantised (`edgefed.moe.packed`), each quantised as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from edgefed.errors import ConfigError
from edgefed.experts import ExpertPlan, Role
from edgefed.kernels.masked_experts import Slots
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import ExpertBank, StreamedSlots
from edgefed.moe.lockstep import pause
from edgefed.moe.packed import check_storage
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource

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
