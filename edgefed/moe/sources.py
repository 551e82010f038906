"""Where the weights of experts come from: anything that reads a unit by its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from edgefed.errors import CheckpointError


class ExpertSource(Protocol):
    """Reads units of the global model. The tensors may be memory-mapped; they are copied, never changed."""

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors by name. Raises CheckpointError when there is no such unit."""
        ...


class MemorySource:
    """Units in memory, e.g. ``MemorySource({spec.key: tensors for spec, tensors in model.iter_units()})``."""

    def __init__(self, units: Mapping[str, Mapping[str, torch.Tensor]]):
        self._units = units

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        if unit_key not in self._units:
            raise CheckpointError(f"no unit {unit_key!r} among the {len(self._units)} units in memory")
        return self._units[unit_key]
