"""The files in which a client keeps its mixture between rounds and restarts. Only theta ever leaves the device.

    FOLDER/personal/RUN_ID/round-000003.safetensors     the whole mixture after round 3, with the momentum of its SGD

A round starts from the newest file of an earlier round. If the device stops before its upload is safe and trains the
round again, it therefore starts from the same weights. The two newest files are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from edgefed.disk import disk_errors, make_folder, settle_file, sync_folder
from edgefed.errors import ConfigError, StateCorrupt

KEPT_ROUNDS = 2
MOMENTUM = "momentum:"
TRAINED = "rounds"
"""Fact of a state: how many rounds its client has trained."""
LOCAL_PARTS = ("own.", "projection.", "gate.")
"""Prefixes of the tensors that never leave the client."""


class PersonalState:
    """The files of one run. ``facts`` describe the mixture (model, classes, extractor, gate) and are fixed in a run."""

    def __init__(self, folder: Path, run_id: str, facts: Mapping[str, str]):
        self._folder = make_folder(make_folder(folder / "personal") / run_id)
        self._facts = dict(facts)

    def keep_files(self, files: Mapping[str, Path]) -> None:
        """Copy the files of the run beside the states, so that predictions need no server. Raises StorageError."""
        if not files:
            return
        folder = make_folder(files_folder(self._folder))
        with disk_errors(folder):
            for name, path in files.items():
                shutil.copyfile(path, folder / Path(name).name)

    def restore(self, mixture: nn.Module, optimizer: torch.optim.Optimizer, server_round: int) -> int:
        """Load own model, gate and their momentum from before ``server_round``; theta stays as it is.

        Returns:
            The round of the state; 0 if there is none, and the mixture is unchanged.

        Raises:
            ConfigError: the state is of another model or of other data.
            StateCorrupt: the file cannot be read or does not fit.
        """
        rounds = [number for number in self._rounds() if number < server_round]
        if not rounds:
            return 0
        tensors, facts = read_state(self._path(rounds[-1]))
        self._check(facts)
        load_tensors(
            mixture, {name: tensor for name, tensor in tensors.items() if name.startswith(LOCAL_PARTS)}, LOCAL_PARTS
        )
        for name, parameter in mixture.named_parameters():
            if f"{MOMENTUM}{name}" in tensors:
                buffer = tensors[f"{MOMENTUM}{name}"].to(parameter.device)
                optimizer.state[parameter]["momentum_buffer"] = buffer
        return rounds[-1]

    def load_newest(self, mixture: nn.Module) -> int:
        """Load the whole mixture as it was after its last round. Returns how many rounds it has trained, or 0.

        Raises as `restore` does.
        """
        if not (rounds := self._rounds()):
            return 0
        tensors, facts = read_state(self._path(rounds[-1]))
        self._check(facts)
        load_tensors(mixture, {name: t for name, t in tensors.items() if not name.startswith(MOMENTUM)}, ("",))
        return int(facts.get(TRAINED, len(rounds)))

    def save(self, mixture: nn.Module, optimizer: torch.optim.Optimizer, server_round: int) -> Path:
        """Save the mixture after ``server_round``, durable on return. Older states are removed."""
        earlier = [number for number in self._rounds() if number < server_round]
        trained = 1 + (int(read_facts(self._path(earlier[-1])).get(TRAINED, len(earlier))) if earlier else 0)
        tensors = unaliased(mixture.state_dict())
        for name, parameter in mixture.named_parameters():
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None and name.startswith(LOCAL_PARTS):
                tensors[f"{MOMENTUM}{name}"] = buffer
        path = self._path(server_round)
        temporary = path.with_suffix(".tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with disk_errors(path):
            save_file(tensors, temporary, metadata={"facts": json.dumps({**self._facts, TRAINED: str(trained)})})
            settle_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
            for number in [number for number in self._rounds() if number <= server_round][:-KEPT_ROUNDS]:
                self._path(number).unlink(missing_ok=True)
        return path

    def _check(self, found: Mapping[str, str]) -> None:
        for name, wanted in self._facts.items():
            if name in found and found[name] != wanted:
                raise ConfigError(
                    f"the state in {self._folder} was trained with {name} {found.get(name)!r}, found {wanted!r} now",
                    remedy=f"Join with the same {name} as before, or with another `state`.",
                )

    def _path(self, server_round: int) -> Path:
        return self._folder / f"round-{server_round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        names = (path.stem.removeprefix("round-") for path in self._folder.glob("round-*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())


def newest_state(folder: Path) -> Path:
    """The newest mixture of a device over all runs; ``folder`` is its state. Raises ConfigError if there is none."""
    found = sorted((folder / "personal").glob("*/round-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise ConfigError(
            f"no mixture found in {folder}", remedy="Pass the `state` folder of a device that joined with `task`."
        )
    return found[-1]


def files_folder(folder: Path) -> Path:
    """Where the files of a run (tokenizer, ...) are kept, in the folder of its states."""
    return folder / "files"


def read_facts(path: Path) -> dict[str, str]:
    """The facts of a state file. Raises StateCorrupt."""
    return read_state(path, only_facts=True)[1]


def read_state(path: Path, *, only_facts: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by name, facts) of a state file. Raises StateCorrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            names = [] if only_facts else file.keys()
            return {name: file.get_tensor(name) for name in names}, facts
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StateCorrupt(f"cannot read {path}: {error}") from error


def unaliased(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once: of names that share storage (tied embeddings), only the first."""
    seen, unique = set(), {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        unique[name] = tensor
    return unique


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], parts: tuple[str, ...]) -> None:
    """Load ``tensors`` into the tensors of ``module`` whose names start with ``parts``. Raises StateCorrupt."""
    wanted = {name for name in unaliased(module.state_dict()) if name.startswith(parts)}
    if wanted != tensors.keys():
        differing = sorted(wanted ^ tensors.keys())
        raise StateCorrupt(
            f"the saved mixture and the current one differ in {len(differing)} tensors, first in {differing[0]!r}"
        )
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise StateCorrupt(f"the saved mixture does not fit: {error}") from error
