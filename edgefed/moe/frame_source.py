"""Units on disk: one safetensors file each, opened only when a unit is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edgefed.errors import CheckpointError
from edgefed.protocol.messages import UnitInfo


def raw_array(tensor: torch.Tensor) -> np.ndarray:
    """The raw bits of a tensor as numpy holds them for a frame: bfloat16 as uint16, bool as uint8."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.view(torch.uint8).numpy() if values.dtype == torch.bool else values.numpy()


class FrameSource:
    """An `edgefed.moe.sources.ExpertSource` over content-addressed files. Holds paths, never tensors."""

    def __init__(self, units: Iterable[UnitInfo] = (), paths: Mapping[str, Path] | None = None):
        self._paths: dict[str, Path] = {}
        self.add(units, paths or {})

    def add(self, units: Iterable[UnitInfo], paths: Mapping[str, Path]) -> None:
        """Make ``units`` readable; ``paths`` maps their sha256 to local files."""
        for unit in units:
            self._paths[unit.key] = Path(paths[unit.sha256])

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        """The tensors of one unit, fresh on the CPU. Raises CheckpointError when it is absent or unreadable."""
        path = self._paths.get(unit_key)
        if path is None:
            raise CheckpointError(f"unit {unit_key!r} is not among the {len(self._paths)} units on this disk")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as fault:
            raise CheckpointError(f"cannot read unit {unit_key!r} from {path}: {fault}") from fault
