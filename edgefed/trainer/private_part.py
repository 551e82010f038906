"""The private part of a device: LoRA adapters of its attention weights, which it trains and never sends.

    y = W x + scale B A x      for every linear layer of the attention; A (R, in), B (out, R), float32

The adapters are trained in the steps of the round, beside what the run shares, and stay from round to round, while the
shared part is averaged. They are not units of the model, so no upload can contain them: an update has what
`MoeModel.trained_units` returns. Rank, scale and learning rate are the run's. FedPer (arXiv 1912.00818) and FLEx
(2506.00965) keep layers and experts private in the same way.

    STATE/private/ROUND.safetensors     the adapters after the round, by names as in an upload of adapters; only the
                                        newest two rounds of a run
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgefed.disk import disk_errors, make_folder, write_durably
from edgefed.errors import ConfigError, StateCorrupt, TrainingDiverged
from edgefed.methods.interface import ExpertMethod
from edgefed.moe.adapters import initial_adapter
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX, VALUE, ExpertSource, TrainScope
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.training.optimizers import clip_gradients
from edgefed.training.steps import train_scope

PRIVATE_FOLDER = "private"
"""In the device's state folder."""
KEPT_ROUNDS = 2
"""The last round may be repeated after a crash: it then begins with the adapters of the one before."""


class PrivatePart:
    """The private part of one device, whose state is in ``folder``. ``kind``: "adapter", or "none": there is none."""

    def __init__(self, folder: Path, kind: str = "none"):
        self.exists = kind != "none"
        self._folder = folder / PRIVATE_FOLDER
        self._parameters: dict[str, nn.Parameter] = {}
        self._start: dict[str, torch.Tensor] = {}
        self._scale = 1.0
        self.version: tuple[str, int] = ("", 0)
        """Run, and the round after which the adapters were saved; 0 before the first."""

    def open(self, model: MoeModel, run: RunConfig, method: ExpertMethod, server_round: int) -> None:
        """Load the adapters with which ``server_round`` begins; initial ones, with B = 0, if there are none.

        Raises ConfigError if the run trains attention itself or exchanges nothing, or the model has no linear attention
        layers; StateCorrupt, StorageError.
        """
        if not self.exists:
            return
        check_run(run.training, method)
        rank, layers = run.training.lora_rank, attention_layers(model)
        rounds = [number for number in saved_rounds(self._folder, run.run_id) if number < server_round]
        version = (run.run_id, max(rounds, default=0))
        if version != self.version or not self._parameters:
            saved = _read(self._folder, version[1]) if rounds else {}
            self._parameters = {}
            for key, layer in layers.items():
                sizes = {VALUE: (layer.in_features, layer.out_features)}
                for name, value in initial_adapter(key, sizes, rank, run.seed).items():
                    full = f"{key}{LORA_SUFFIX}.{name}"
                    if saved and (full not in saved or saved[full].shape != value.shape):
                        raise StateCorrupt(f"{self._folder} does not fit the model: {full}")
                    self._parameters[full] = nn.Parameter(saved.get(full, value).to(model.device))
        self.version, self._scale = version, train_scope(run.training).lora_scale
        self.mark()

    def mark(self, changed: bool = True) -> None:
        """Let `restart` return to the adapters of now, if they have ``changed`` for good."""
        if changed:
            self._start = {name: value.detach().clone() for name, value in self._parameters.items()}

    def restart(self, training: TrainingConfig) -> Callable[[float], None]:
        """Return to the last `mark`; returns a step of a new AdamW, to call with a learning rate after a backward."""
        if not self.exists:
            return lambda rate: None
        with torch.no_grad():
            for name, value in self._start.items():
                self._parameters[name].copy_(value)
        parameters = list(self._parameters.values())
        optimizer = torch.optim.AdamW(parameters, weight_decay=0)

        def step(rate: float) -> None:
            clip_gradients(parameters, training.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        optimizer.zero_grad(set_to_none=True)
        return step

    @contextlib.contextmanager
    def active(self, model: MoeModel) -> Iterator[None]:
        """Within this context, the outputs of the model's attention layers have the adapters in them."""
        layers = attention_layers(model) if self.exists else {}
        handles = [
            layer.register_forward_hook(self._hook(f"{key}{LORA_SUFFIX}.{VALUE}")) for key, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        lora_a, lora_b = self._parameters[f"{name}.lora_a"], self._parameters[f"{name}.lora_b"]

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            update = (inputs[0].to(lora_a.dtype) @ lora_a.T) @ lora_b.T
            return output + (self._scale * update).to(output.dtype)

        return add

    def save(self, run_id: str, server_round: int) -> None:
        """Keep the adapters as those after ``server_round``, durably. Raises TrainingDiverged, StorageError."""
        if not self.exists:
            return
        tensors = {name: value.detach().cpu() for name, value in self._parameters.items()}
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            raise TrainingDiverged("the private adapters hold a value that is not finite")
        make_folder(self._folder)
        data = safetensors.torch.save(tensors, metadata={"run_id": run_id})
        write_durably(_path(self._folder, server_round), data)
        self.version = (run_id, server_round)
        kept = set(saved_rounds(self._folder, run_id)[-KEPT_ROUNDS:])
        with disk_errors(self._folder):
            for path in self._folder.glob("*.safetensors"):
                if int(path.stem) not in kept:
                    path.unlink(missing_ok=True)


def attention_layers(model: MoeModel) -> dict[str, nn.Linear]:
    """The layers of the attention by the keys of their weights. Raises ConfigError if one is not linear."""
    scope = TrainScope(experts="none", router="none", attention="full")
    keys = [unit.key for unit in model.unit_infos(scope) if unit.trainable]
    layers = {key: model.module.get_submodule(key.rpartition(".")[0]) for key in keys}
    linear = {key: layer for key, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not layers or len(linear) < len(layers):
        raise ConfigError(
            f"`private=adapter` needs linear attention layers; found {len(linear)} of {len(layers)}",
            remedy="Join without `private`.",
        )
    return linear


def check_run(training: TrainingConfig, method: ExpertMethod) -> None:
    """Raise ConfigError if a private adapter would change weights that the run trains, or nothing is shared."""
    if not method.exchanges:
        raise ConfigError(
            f"`private=adapter` has no effect with {method.name}: everything is private",
            remedy="Join without `private`.",
        )
    if training.attention != "none":
        raise ConfigError(
            f"`private=adapter` needs a run that does not train attention; this one has "
            f"`train_attention={training.attention}`",
            remedy="Join without `private`.",
        )


def saved_rounds(folder: Path, run_id: str) -> list[int]:
    """The rounds of a run after which adapters were saved in the ``private`` folder, ascending. Raises StateCorrupt."""
    found = []
    for path in folder.glob("*.safetensors"):
        try:
            with disk_errors(path), safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("run_id") == run_id:
                    found.append(int(path.stem))
        except (SafetensorError, ValueError) as error:
            raise StateCorrupt(f"{path} is damaged: {error}") from error
    return sorted(found)


def load_private(state: Path, run_id: str) -> dict[str, dict[str, torch.Tensor]]:
    """The newest private adapters of a device in a run, {unit key: tensors by name}; empty if it has none.

    Keys and names are those of adapters of attention weights. Raises StateCorrupt, StorageError.
    """
    rounds = saved_rounds(folder := state / PRIVATE_FOLDER, run_id)
    units: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in (_read(folder, rounds[-1]) if rounds else {}).items():
        key, _, own = name.rpartition(f"{LORA_SUFFIX}.")
        units.setdefault(key + LORA_SUFFIX, {})[own] = value
    return units


class PrivateSource:
    """An `ExpertSource` of the units of another one and of a device's private adapters, as `load_private` returns."""

    def __init__(self, source: ExpertSource, adapters: Mapping[str, Mapping[str, torch.Tensor]]):
        self._source, self._adapters = source, adapters

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a unit by name. Raises CheckpointError if there is no such unit."""
        return self._adapters[unit_key] if unit_key in self._adapters else self._source.read(unit_key)


def _path(folder: Path, server_round: int) -> Path:
    return folder / f"{server_round}.safetensors"


def _read(folder: Path, server_round: int) -> Mapping[str, torch.Tensor]:
    path = _path(folder, server_round)
    with disk_errors(path):
        data = path.read_bytes()
    try:
        found: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise StateCorrupt(f"{path} is damaged: {error}") from error
    return found
