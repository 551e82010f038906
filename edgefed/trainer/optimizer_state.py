"""Moments of the optimizer from round to round, on the device's disk (`TrainingConfig.keep_optimizer`).

By default each round begins with fresh moments, as in FedAvg. DiLoCo (arXiv 2311.08105) keeps those of the devices'
optimizer, which then knows in its first step how large the gradients are.

    STATE/optimizer/RUN.ROUND.safetensors     after that round: moments and step count of each trained parameter

Only parameters that trained in the last round have moments: those of a unit that the plan no longer trains are dropped.
Between rounds the moments take no memory. In the steps they take what fresh ones take, for which plans have room. A
round that is repeated after a crash begins with the moments of the round before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgefed.disk import disk_errors, make_folder
from edgefed.moe.expert_reading import raw_array
from edgefed.moe.model import MoeModel
from edgefed.moe.units import dtype_name
from edgefed.protocol import frames
from edgefed.training.optimizers import moments_of, resume_moments

OPTIMIZER_FOLDER = "optimizer"
"""In the device's state folder."""


class OptimizerState:
    """The moments of ``model`` on one device in a round of a run; ``folder`` is the device's state.

    ``report`` is told when moments cannot be kept.
    """

    def __init__(self, folder: Path, run_id: str, server_round: int, model: MoeModel, report: Callable[[str], None]):
        self._folder, self._run_id, self._round = folder / OPTIMIZER_FOLDER, run_id, server_round
        self._model, self._report = model, report

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Give ``optimizer`` the moments with which the round begins. Returns how many parameters have some.

        Moments of another shape or dtype are left out, and so are all of a damaged file. Raises StorageError.
        """
        saved = dict(self._saved())
        before = max((number for number in saved if number < self._round), default=0)
        with disk_errors(self._folder):
            for number in saved.keys() - {before, self._round}:
                saved[number].unlink(missing_ok=True)
        if not before:
            return 0
        try:
            with disk_errors(self._folder), safe_open(saved[before], "pt") as file:
                return self._fill(optimizer, file)
        except SafetensorError as error:
            self._report(f"optimizer: {saved[before]} is damaged, moments begin anew: {error}")
            return 0

    def _fill(self, optimizer: torch.optim.Optimizer, file: Any) -> int:
        parts: dict[str, dict[str, str]] = {}
        for full in file.keys():  # noqa: SIM118  # it is no mapping
            name, _, part = full.rpartition("|")
            parts.setdefault(name, {})[part] = full
        resumed = 0
        for name, parameter in trainable_names(self._model).items():
            kept = {part: file.get_tensor(full) for part, full in parts.get(name, {}).items()}
            resumed += bool(kept) and resume_moments(optimizer, parameter, kept)
        return resumed

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the moments as those after the round, durably. Raises StorageError."""
        kept = {
            f"{name}|{part}": (dtype_name(value.dtype), raw_array(value))
            for name, parameter in trainable_names(self._model).items()
            for part, value in moments_of(optimizer, parameter).items()
        }
        if not kept:
            self._report("optimizer: 8-bit moments are not kept, each round begins with fresh ones")
            return
        make_folder(self._folder)
        with disk_errors(self._folder):
            frames.write_frame(self._folder / f"{self._run_id}.{self._round}.safetensors", kept)

    def _saved(self) -> Iterator[tuple[int, Path]]:
        """(round, file) of this run; files of other runs are deleted. Raises StorageError."""
        with disk_errors(self._folder):
            for path in sorted(self._folder.glob("*.safetensors")):
                run_id, _, number = path.stem.rpartition(".")
                if run_id == self._run_id and number.isdigit():
                    yield int(number), path
                else:
                    path.unlink(missing_ok=True)


def trainable_names(model: MoeModel) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by names that are the same in every plan; of slices, with their neurons."""
    slices: dict[nn.Parameter, str] = {}
    for bank in map(model.bank, range(len(model.layers))):
        for slot, neurons in enumerate(bank.neurons):
            for parameter in (*bank.tensors(slot).values(), *bank.tensors(slot, adapter=True).values()):
                slices[parameter] = f"@{zlib.crc32(neurons.numpy().tobytes()):08x}"
    named = model.module.named_parameters()
    return {name + slices.get(value, ""): value for name, value in named if value.requires_grad}
