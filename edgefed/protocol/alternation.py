"""Factors of LoRA adapters that alternate by round: RoLoRA (Chen et al., arXiv 2409.02346, algorithm 1).

An adapter adds B A to a weight. In rounds 1, 3, 5, ... clients train and send B, in the others A. The other factor
rests. The weighted mean of the sent factors is then exact:

    sum_c w_c (B_c A) = (sum_c w_c B_c) A        sum_c w_c (B A_c) = B (sum_c w_c A_c)        with sum_c w_c = 1

B comes first, since it begins at 0, and A has no gradient before B has left it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edgefed.protocol.messages import UnitInfo
from edgefed.protocol.training import TrainingConfig

LORA_A, LORA_B = ".lora_a", ".lora_b"
"""Ends of the names of a tensor's two factors."""


def resting_factor(training: TrainingConfig, server_round: int) -> str | None:
    """The end of the names of the factors that do not train in this round; None if all do."""
    if training.lora_factors != "alternate":
        return None
    return LORA_A if server_round % 2 else LORA_B


def sent_units(units: Iterable[UnitInfo], training: TrainingConfig, server_round: int) -> tuple[UnitInfo, ...]:
    """``units`` with the tensors that clients train and send in this round; blobs still have all of them."""
    resting = resting_factor(training, server_round)
    if resting is None:
        return tuple(units)
    return tuple(
        msgspec.structs.replace(unit, tensors=tuple(info for info in unit.tensors if not info.name.endswith(resting)))
        if unit.trainable
        else unit
        for unit in units
    )
