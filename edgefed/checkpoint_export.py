"""Write the global model as an ordinary Hugging Face checkpoint that transformers loads without edgefed.

Weights are written one parameter at a time, so that the whole model is never in memory. All other files of the
checkpoint that the run was made from are copied unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from edgefed.disk import sync_folder
from edgefed.errors import CheckpointError, ConfigError, DiskFull, EdgefedError, StorageError
from edgefed.moe import adapters
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.expert_reading import read_expert, read_with_adapter
from edgefed.moe.file_tensors import FileTensor
from edgefed.moe.loading import build_skeleton, load_config, read_config_file
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, FixedTensors, TrainScope, check_tensors, find_fixed_tensors
from edgefed.moe.weight_files import WEIGHT_SUFFIXES, WeightFiles, WeightWriter


def export_checkpoint(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    dtype: str | torch.dtype = "auto",
    scope: TrainScope | None = None,
) -> Path:
    """Write all units as a checkpoint folder and return ``to``.

    The folder appears complete or not at all: it is written next to its place, synced and renamed. Tensors that a
    checkpoint has as the units have them are copied from file to file. The memory peak is otherwise about two
    parameters, where all experts of a layer count as one.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json, tokenizer and all other files that are not weights; they are copied.
        to: the new folder; it must not exist or be empty.
        dtype: dtype of the weights that have the model's main dtype; "auto" does not change it. Tensors that the model
            has in another dtype, such as correction biases, are not cast.
        scope: how the run trained; adapters are merged into the weights. None: nothing was trained by LoRA.

    Raises:
        ConfigError: the target is in use, or the dtype is invalid.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the checkpoint cannot be written.

    """
    target, files_folder = Path(to), Path(files_folder)
    with new_folder(target, "checkpoint") as folder:
        state = _ModelState(
            files_folder, units, scope or TrainScope(experts="none", router="none"), _wanted_dtype(dtype)
        )
        _write_weights(state, folder)
        _copy_files(files_folder, folder)
        _write_config(files_folder, folder, state)
        check_checkpoint(folder)
    return target


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


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless the configuration and the weights of a folder can be read."""
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        found = set(WeightFiles(folder).names)
        index = folder / "model.safetensors.index.json"
        expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else found
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise CheckpointError(f"the written checkpoint cannot be read back: {error}") from error
    if not found or found != expected:
        raise CheckpointError(f"the written checkpoint has {len(found)} of {len(expected)} tensors")


class _ModelState:
    """The tensors of the transformers model by name, each computed from its units when it is needed."""

    def __init__(self, folder: Path, units: ExpertSource, scope: TrainScope, dtype: torch.dtype | None):
        self.module: PreTrainedModel = build_skeleton(load_config(folder))
        self.dtype = dtype
        """Dtype to which the weights of the main dtype are cast, or None."""
        self._units, self._scope = units, scope
        self._layers = discover_layers(self.module)
        self._fixed = find_fixed_tensors(self.module, self._layers)
        self._fixed_of: dict[str, tuple[FixedTensors, str]] = {}
        self._expert_of: dict[str, tuple[ExpertLayer, str]] = {}
        self.empty: dict[str, torch.Tensor] = {}
        """Meta tensors of the dtypes and shapes of the units, by parameter name. Checks the units that it reads."""
        for layer in self._layers:
            for name, tensor in read_expert(layer, 0, units).items():
                full = f"{layer.experts_path}.{name}"
                self._expert_of[full] = layer, name
                self.empty[full] = torch.empty((layer.num_experts, *tensor.shape), dtype=tensor.dtype, device="meta")
        self._main_dtype = self.empty[next(iter(self._expert_of))].dtype
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

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_buffer = name in self._fixed_of and self._place_is_buffer(name)
        return tensor if self.dtype is None or is_buffer or tensor.dtype != self._main_dtype else tensor.to(self.dtype)

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
        layer, own = self._expert_of[name]
        stack: torch.Tensor | None = None
        in_files: list[torch.Tensor] = []
        for expert in range(layer.num_experts):
            tensor = read_with_adapter(layer, expert, self._units, self._scope, only=own)[own]
            if expert == 0:
                dtype = tensor.dtype
                if not isinstance(tensor, FileTensor):
                    stack = torch.empty((layer.num_experts, *tensor.shape), dtype=dtype)
            if tensor.dtype != dtype:
                raise CheckpointError(f"{own!r} of {layer.expert_key(expert)!r} must be {dtype}; found {tensor.dtype}")
            if stack is None:
                in_files.append(tensor)
            else:
                stack[expert] = tensor
        return torch.stack(in_files) if stack is None else stack


def _write_weights(state: _ModelState, folder: Path) -> None:
    """Convert the parameters to the names and shapes of checkpoints, one group at a time, and write them."""
    mapping: Any = get_model_conversion_mapping(state.module, add_legacy=False)
    vars(state.module)["_weight_conversions"] = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    converted = _revert(state, state.empty)
    groups = [[name] for name in state.empty]
    if _shapes(_revert(state, {name: state.empty[name]}) for (name,) in groups) != _shapes([converted]):
        groups = list(_by_decoder_layer(state.empty))  # some parameters of a layer are fused in the checkpoint
    with WeightWriter(folder, converted) as writer:
        for group in groups:
            for name, tensor in _revert(state, {name: state.read(name) for name in group}).items():
                writer.write(name, tensor)


def _revert(state: _ModelState, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = revert_weight_conversion(state.module, dict(tensors))
    return found


def _shapes(found: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for tensors in found for name, tensor in tensors.items()}


def _by_decoder_layer(names: Iterable[str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        groups.setdefault(layer.group() if layer else name, []).append(name)
    yield from groups.values()


def _wanted_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"dtype of a checkpoint must be float32, bfloat16 or float16; found {dtype!r}")
    return wanted


def _copy_files(source: Path, target: Path) -> None:
    """Copy all files except weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


def _write_config(source: Path, target: Path, state: _ModelState) -> None:
    """Change config.json where it does not describe the written weights."""
    settings = read_config_file(source)
    changed = dict(settings)
    if state.dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(state.dtype).removeprefix("torch.")
    if not changed.get("architectures"):
        changed["architectures"] = [type(state.module).__name__]
    if changed != settings:
        (target / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
