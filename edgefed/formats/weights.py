"""The merged weights of a model, read one parameter at a time, and the new folder that an export writes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from edgefed.disk import sync_folder
from edgefed.errors import CheckpointError, ConfigError, DiskFull, EdgefedError, StorageError
from edgefed.moe import adapters
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.expert_reading import read_expert, read_with_adapter
from edgefed.moe.file_tensors import FileTensor
from edgefed.moe.loading import build_skeleton, load_config
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, FixedTensors, TrainScope, check_tensors, find_fixed_tensors

Routing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(T, K) experts and weights that a router chose -> (T, K) slots and weights."""


@contextlib.contextmanager
def new_folder(target: Path, what: str) -> Iterator[Path]:
    """Create ``target`` complete or not at all: yield a folder next to its place, which becomes it at the end.

    That folder may be the target of another context. Errors name ``target`` in either case. Raises ConfigError if the
    target is in use, and StorageError or DiskFull, which call the folder a ``what``, for errors of the disk in the
    context.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"cannot export to {str(target)!r}: it exists and is not an empty folder")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp creates a private folder
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
        sync_folder(target.parent)
    except EdgefedError as error:
        error.args = (str(error).replace(str(temporary), str(target)),)
        raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        kind = DiskFull if full else StorageError
        raise kind(f"cannot write the {what} to {str(target)!r}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class MergedModel:
    """The tensors of the transformers model by name, with adapters merged, each computed from its units when needed.

    ``dtype``: the weights of the model's main dtype are cast to it. Raises CheckpointError if a unit does not fit.
    """

    def __init__(self, folder: Path, units: ExpertSource, scope: TrainScope | None, dtype: torch.dtype | None = None):
        self.module: PreTrainedModel = build_skeleton(load_config(folder))
        self.dtype = dtype
        """Dtype to which the weights of the main dtype are cast, or None."""
        self._units, self._scope = units, scope or TrainScope(experts="none", router="none")
        self.layers = discover_layers(self.module)
        self._fixed = find_fixed_tensors(self.module, self.layers)
        self._fixed_of: dict[str, tuple[FixedTensors, str]] = {}
        self._expert_of: dict[str, tuple[ExpertLayer, str]] = {}
        self.empty: dict[str, torch.Tensor] = {}
        """Meta tensors of the dtypes and shapes of the units, by parameter name. Checks the units that it reads."""
        for layer in self.layers:
            for name, tensor in self._sample(layer).items():
                full = f"{layer.experts_path}.{name}"
                self._expert_of[full] = layer, name
                self.empty[full] = torch.empty((layer.num_experts, *tensor.shape), dtype=tensor.dtype, device="meta")
        self.main_dtype = self.empty[next(iter(self._expert_of))].dtype
        for fixed in self._fixed.values():
            tensors = units.read(fixed.key)
            shapes = {name: tuple(place.get().shape) for name, place in fixed.places.items()}
            check_tensors(fixed.key, tensors, shapes)
            for name, place in fixed.places.items():
                self._fixed_of[place.full_name] = fixed, name
                self.empty[place.full_name] = torch.empty(shapes[name], dtype=tensors[name].dtype, device="meta")
        self.empty = {name: self._cast(name, tensor) for name, tensor in self.empty.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one parameter, with adapters merged. Raises CheckpointError."""
        return self._cast(name, self._fixed_tensor(name) if name in self._fixed_of else self._stack(name))

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """Yield one parameter, a stack of experts expert by expert. Raises CheckpointError."""
        if name in self._fixed_of:
            yield self.read(name)
        else:
            yield from (self._cast(name, tensor) for tensor in self._experts(name))

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """Return one expert's row of a stack, with its adapter merged. Raises CheckpointError."""
        layer, own = self._expert_of[name]
        return self._cast(name, read_with_adapter(layer, expert, self._units, self._scope, only=own)[own])

    def num_slots(self, layer: ExpertLayer) -> int:
        """Number of the experts of a layer, which `expert` counts."""
        return layer.num_experts

    def num_neurons(self, layer: ExpertLayer) -> int:
        """Neurons of each expert of a layer."""
        return layer.num_neurons

    def routing(self, layer: ExpertLayer) -> Routing:
        """Return what maps the router's choice to the experts that `expert` counts: the choice itself."""
        return lambda indices, weights: (indices, weights)

    def _sample(self, layer: ExpertLayer) -> Mapping[str, torch.Tensor]:
        """Return the tensors of an expert of a layer, for their dtypes and shapes."""
        return read_expert(layer, 0, self._units)

    def load_fixed(self) -> None:
        """Put every tensor that is not of an expert into ``module``, with adapters merged. Raises CheckpointError."""
        for name, (fixed, own) in self._fixed_of.items():
            fixed.places[own].replace(self.read(name).detach().to("cpu", copy=True))

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_buffer = name in self._fixed_of and self._place_is_buffer(name)
        return tensor if self.dtype is None or is_buffer or tensor.dtype != self.main_dtype else tensor.to(self.dtype)

    def _place_is_buffer(self, name: str) -> bool:
        fixed, own = self._fixed_of[name]
        return fixed.places[own].is_buffer

    def _fixed_tensor(self, name: str) -> torch.Tensor:
        fixed, own = self._fixed_of[name]
        tensor = self._units.read(fixed.key)[own]
        if fixed.mode(self._scope) == "lora" and own in fixed.matrices:
            adapter = self._units.read(fixed.key + LORA_SUFFIX)
            lora_a, lora_b = adapter[f"{own}.lora_a"], adapter[f"{own}.lora_b"]
            update = adapters.low_rank_product(lora_a, lora_b, self._scope.lora_scale)
            return (tensor.float() + update).to(tensor.dtype)
        return tensor

    def _stack(self, name: str) -> torch.Tensor:
        layer, _ = self._expert_of[name]
        stack: torch.Tensor | None = None
        in_files: list[torch.Tensor] = []
        for expert, tensor in enumerate(self._experts(name)):
            if isinstance(tensor, FileTensor):
                in_files.append(tensor)
                continue
            if stack is None:
                stack = torch.empty((layer.num_experts, *tensor.shape), dtype=tensor.dtype)
            stack[expert] = tensor
        return torch.stack(in_files) if stack is None else stack

    def _experts(self, name: str) -> Iterator[torch.Tensor]:
        layer, own = self._expert_of[name]
        dtype: torch.dtype | None = None
        for expert in range(layer.num_experts):
            tensor = read_with_adapter(layer, expert, self._units, self._scope, only=own)[own]
            dtype = dtype or tensor.dtype
            if tensor.dtype != dtype:
                raise CheckpointError(f"{own!r} of {layer.expert_key(expert)!r} must be {dtype}; found {tensor.dtype}")
            yield tensor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
